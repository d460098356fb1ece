package auth

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/golang-jwt/jwt/v5"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
)

const (
	// MaxTokenBytes bounds a token; a longer one is refused before it is parsed.
	MaxTokenBytes = 8 << 10
	// Leeway is how far exp, nbf and iat may be off: the clocks of issuer and
	// gateway differ (PROTOCOL 3.4).
	Leeway = 60 * time.Second

	minSecretBytes  = 32
	maxSubjectBytes = 256
	// maxNumericDate is the last second of the year 9999. Beyond it a float may
	// not convert to a time at all.
	maxNumericDate = 253_402_300_799
)

// ErrToken is the one error of Verify. Its text is the same for every cause, so
// that an answer tells a guesser nothing; the cause is counted in the metric
// topgun_auth_failures_total.
var ErrToken = errors.New("token refused")

// Config says which tokens are accepted. At most one of Secret and JWKSURL may be
// set; with neither, no token is required.
type Config struct {
	// Secret is a shared HS256 secret, which should have 32 random bytes (RFC 7518
	// 3.2; a shorter one works and is warned of), or, when it begins with
	// -----BEGIN, a PEM public key: RSA (at least 2048 bits) for RS256, P-256 for
	// ES256. Literal \n sequences in a PEM are newlines.
	Secret string
	// JWKSURL is where the public keys for RS256 and ES256 are fetched: https, or
	// http on a loopback address.
	JWKSURL string
	// Issuer, if set, must equal the token's iss.
	Issuer string
	// Audience, if set, must be among the token's aud.
	Audience string
	// JWKSRefresh is how often the keys are fetched again; 0 means every 5 minutes.
	// It bounds how long a removed key is still accepted.
	JWKSRefresh time.Duration
	// JWKSPause is the least time between two fetches, whoever asks; 0 means 5
	// seconds. A token with an unknown key id asks for a fetch, so a pause that
	// always ends keeps bogus ids from using the fetches up.
	JWKSPause time.Duration
}

// Configured reports whether a token is required.
func (c Config) Configured() bool { return c.Secret != "" || c.JWKSURL != "" }

// Validate reports the first setting that cannot work, and what would. It never
// repeats the secret.
func (c Config) Validate() error {
	if c.Secret != "" && c.JWKSURL != "" {
		return errors.New("a secret and a JWKS URL are both set: remove one, only the configured keys may sign")
	}
	if !c.Configured() && (c.Issuer != "" || c.Audience != "") {
		return errors.New("issuer or audience is set, but no key: set a JWT secret, public key or JWKS URL")
	}
	if c.JWKSRefresh < 0 || c.JWKSPause < 0 {
		return errors.New("JWKS intervals: must not be negative")
	}
	if c.Secret != "" {
		_, _, err := parseSecret(c.Secret)
		return err
	}
	if c.JWKSURL != "" {
		return checkJWKSURL(c.JWKSURL)
	}
	return nil
}

// Deps lists what a Verifier works with; all may be nil.
type Deps struct {
	// Logger gets one line when keys were fetched or could not be; nil discards.
	Logger *slog.Logger
	// Meter makes the instruments; nil measures nothing.
	Meter metric.Meter
	// Now is the wall clock; nil means time.Now.
	Now func() time.Time
}

// Principal is who a client is.
type Principal struct {
	// UserID is the token's sub: 1 to 256 bytes of UTF-8 without control
	// characters; empty when Anonymous.
	UserID string
	// Roles is the token's roles; often empty.
	Roles []string
	// Expires is when the principal ends; zero means never.
	Expires time.Time
	// Anonymous says that no token is required and nobody was identified.
	Anonymous bool
}

// Verifier verifies tokens. Its methods may be called concurrently.
type Verifier struct {
	parser   *jwt.Parser
	static   any     // the key of Secret, or nil
	jwks     *keySet // the keys of JWKSURL, or nil
	throttle *throttle
	failures metric.Int64Counter
	now      func() time.Time
}

// New checks the configuration and makes a Verifier. It does no I/O: with a JWKS
// URL no token is accepted until Run fetched the keys.
func New(cfg Config, deps Deps) (*Verifier, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if deps.Now == nil {
		deps.Now = time.Now
	}
	if deps.Logger == nil {
		deps.Logger = slog.New(slog.DiscardHandler)
	}
	if deps.Meter == nil {
		deps.Meter = noop.Meter{}
	}
	failures, err := deps.Meter.Int64Counter("topgun_auth_failures_total",
		metric.WithDescription("Tokens refused, by reason."))
	if err != nil {
		return nil, fmt.Errorf("make the auth failure counter: %w", err)
	}
	v := &Verifier{throttle: newThrottle(deps.Now), failures: failures, now: deps.Now}
	var methods []string
	switch {
	case cfg.Secret != "":
		method, key, err := parseSecret(cfg.Secret)
		if err != nil {
			return nil, err
		}
		if raw, ok := key.([]byte); ok && len(raw) < minSecretBytes {
			// Refusing would lock out who moves here with tokens of another server.
			deps.Logger.Warn("the JWT secret is short: who sees a token can search for it; "+
				"use 32 random bytes, for example from openssl rand -base64 32", "bytes", len(raw))
		}
		v.static, methods = key, []string{method}
	case cfg.JWKSURL != "":
		if v.jwks, err = newKeySet(cfg, deps); err != nil {
			return nil, err
		}
		methods = []string{jwt.SigningMethodRS256.Alg(), jwt.SigningMethodES256.Alg()}
	default:
		return v, nil
	}
	options := []jwt.ParserOption{
		jwt.WithValidMethods(methods),
		jwt.WithExpirationRequired(),
		jwt.WithIssuedAt(),
		jwt.WithLeeway(Leeway),
		jwt.WithStrictDecoding(),
		jwt.WithTimeFunc(deps.Now),
	}
	if cfg.Issuer != "" {
		options = append(options, jwt.WithIssuer(cfg.Issuer))
	}
	if cfg.Audience != "" {
		options = append(options, jwt.WithAudience(cfg.Audience))
	}
	v.parser = jwt.NewParser(options...)
	return v, nil
}

// Required reports whether clients must present a token.
func (v *Verifier) Required() bool { return v.parser != nil }

// Ready is nil when tokens can be verified, else it says why not.
func (v *Verifier) Ready() error {
	if v.jwks != nil && !v.jwks.loaded() {
		return errors.New("no signing keys were fetched yet")
	}
	return nil
}

// Run keeps the keys of a JWKS URL fresh until ctx ends, then returns nil. Without
// a JWKS URL it only waits.
func (v *Verifier) Run(ctx context.Context) error {
	if v.jwks == nil {
		<-ctx.Done()
		return nil
	}
	v.jwks.run(ctx)
	return nil
}

// Verify says whose token it is, or returns ErrToken. When no token is required
// every token, also an empty one, gives the anonymous principal (PROTOCOL 3.3).
//
// A refusal may be delayed by up to 5 seconds if the address of ctx (WithAddress)
// had many refused before, and while keys for an unknown key id are being fetched;
// a good token is not delayed by others' bad ones.
func (v *Verifier) Verify(ctx context.Context, token string) (Principal, error) {
	if !v.Required() {
		return Principal{Anonymous: true}, nil
	}
	principal, reason := v.check(ctx, token)
	if reason == "" {
		return principal, nil
	}
	v.failures.Add(ctx, 1, metric.WithAttributes(attribute.String("reason", reason)))
	if reason != "absent" {
		v.throttle.wait(ctx)
	}
	return Principal{}, ErrToken
}

// check returns the principal, or the reason for which there is none.
func (v *Verifier) check(ctx context.Context, raw string) (p Principal, reason string) {
	if raw == "" {
		return p, "absent"
	}
	if len(raw) > MaxTokenBytes {
		return p, "too_long"
	}
	claims := jwt.MapClaims{}
	token, err := v.parser.ParseWithClaims(raw, claims, func(t *jwt.Token) (any, error) {
		if !goodHeader(t.Header) {
			return nil, errHeader
		}
		if v.jwks != nil {
			return v.jwks.key(ctx, t)
		}
		return v.static, nil
	})
	if err != nil {
		return p, causeOf(err)
	}
	if !validPayload(token.Raw) {
		return p, "malformed"
	}
	subject, ok := claims["sub"].(string)
	if !ok || !goodSubject(subject) {
		return p, "subject"
	}
	roles, ok := rolesOf(claims["roles"])
	if !ok {
		return p, "roles"
	}
	// The parser has checked that exp is there and that it is a number.
	exp, _ := claims["exp"].(float64)
	if exp < 0 || exp > maxNumericDate {
		return p, "expired"
	}
	expires := time.Unix(int64(exp), 0)
	if !expires.After(v.now()) {
		// Accepted within the leeway, so it must not end before it began.
		expires = expires.Add(Leeway)
	}
	return Principal{UserID: subject, Roles: roles, Expires: expires}, ""
}

var errHeader = errors.New("token header refused")

// goodHeader checks the header fields that change how a token is to be read. The
// ones that name keys elsewhere (jku, jwk, x5u, x5c) are never looked at.
func goodHeader(header map[string]any) bool {
	if _, ok := header["crit"]; ok {
		return false // lists extensions that must be understood; we know none
	}
	if typ, ok := header["typ"]; ok {
		s, ok := typ.(string)
		if !ok || (!strings.EqualFold(s, "JWT") && !strings.EqualFold(s, "at+jwt")) {
			return false
		}
	}
	if kid, ok := header["kid"]; ok {
		s, ok := kid.(string)
		if !ok || len(s) > maxKeyIDBytes {
			return false
		}
	}
	return true
}

// validPayload reports whether the claims are valid UTF-8. The JSON decoder puts
// U+FFFD in place of invalid bytes, so two subjects could become one.
func validPayload(raw string) bool {
	parts := strings.Split(raw, ".")
	if len(parts) != 3 {
		return false
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	return err == nil && utf8.Valid(payload)
}

func goodSubject(s string) bool {
	return s != "" && len(s) <= maxSubjectBytes && !strings.ContainsFunc(s, func(r rune) bool {
		// U+FFFD is also what an escaped lone surrogate decodes to.
		return r == utf8.RuneError || unicode.IsControl(r)
	})
}

func rolesOf(claim any) ([]string, bool) {
	if claim == nil {
		return nil, true
	}
	list, ok := claim.([]any)
	if !ok {
		return nil, false
	}
	roles := make([]string, 0, len(list))
	for _, item := range list {
		role, ok := item.(string)
		if !ok {
			return nil, false
		}
		roles = append(roles, role)
	}
	return roles, true
}

// causeOf names the cause of a parser error for the metric.
func causeOf(err error) string {
	for _, c := range []struct {
		err  error
		name string
	}{
		{errHeader, "header"},
		{errNoKey, "unknown_key"},
		{jwt.ErrTokenMalformed, "malformed"},
		{jwt.ErrTokenSignatureInvalid, "signature"},
		{jwt.ErrTokenUnverifiable, "algorithm"},
		{jwt.ErrTokenExpired, "expired"},
		{jwt.ErrTokenNotValidYet, "not_yet_valid"},
		{jwt.ErrTokenUsedBeforeIssued, "not_yet_valid"},
		{jwt.ErrTokenInvalidIssuer, "issuer"},
		{jwt.ErrTokenInvalidAudience, "audience"},
	} {
		if errors.Is(err, c.err) {
			return c.name
		}
	}
	return "claims"
}
