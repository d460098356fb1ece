package auth

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"go.opentelemetry.io/otel/attribute"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
)

const secret = "a-secret-of-more-than-thirty-two-bytes"

// Keys are made once: RSA keys take long, above all under the race detector.
var (
	rsaKeys = sync.OnceValue(func() (keys [2]*rsa.PrivateKey) {
		for i := range keys {
			keys[i] = must(rsa.GenerateKey(rand.Reader, 2048))
		}
		return keys
	})
	ecKey = sync.OnceValue(func() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) })
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func publicPEM(key any) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: must(x509.MarshalPKIXPublicKey(key))}))
}

// now is the middle of a second, so that comparisons at exact seconds are clear.
var now = time.Date(2026, 3, 1, 12, 0, 0, 500e6, time.UTC)

func at(d time.Duration) int64 { return now.Add(d).Unix() }

// claims returns good claims with changes; a nil value removes the claim.
func claims(change map[string]any) jwt.MapClaims {
	c := jwt.MapClaims{"sub": "alice", "exp": at(time.Hour), "iat": at(-time.Minute)}
	for name, value := range change {
		if value == nil {
			delete(c, name)
		} else {
			c[name] = value
		}
	}
	return c
}

func sign(method jwt.SigningMethod, key any, header map[string]any, c jwt.Claims) string {
	token := jwt.NewWithClaims(method, c)
	maps.Copy(token.Header, header)
	return must(token.SignedString(key))
}

// rawHS256 signs any header and payload, also such as a library would not make.
func rawHS256(key []byte, header, payload string) string {
	signed := base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString([]byte(payload))
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(signed))
	return signed + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

func newVerifier(t *testing.T, cfg Config) *Verifier {
	t.Helper()
	v, err := New(cfg, Deps{Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestVerifySecret(t *testing.T) {
	hs := func(header map[string]any, change map[string]any) string {
		return sign(jwt.SigningMethodHS256, []byte(secret), header, claims(change))
	}
	payload := fmt.Sprintf(`"sub":"alice","exp":%d`, at(time.Hour))
	good := hs(nil, nil)
	head, rest, _ := strings.Cut(good, ".")
	body, _, _ := strings.Cut(rest, ".")
	none := func(alg string) string {
		h := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"` + alg + `","typ":"JWT"}`))
		return h + "." + body + "."
	}
	for name, c := range map[string]struct {
		token string
		user  string // empty: refused
	}{
		"good":                        {good, "alice"},
		"exp within the leeway":       {hs(nil, map[string]any{"exp": at(-59 * time.Second)}), "alice"},
		"exp past the leeway":         {hs(nil, map[string]any{"exp": at(-61 * time.Second)}), ""},
		"exp missing":                 {hs(nil, map[string]any{"exp": nil}), ""},
		"exp is text":                 {hs(nil, map[string]any{"exp": fmt.Sprint(at(time.Hour))}), ""},
		"exp is zero":                 {hs(nil, map[string]any{"exp": 0}), ""},
		"exp is negative":             {hs(nil, map[string]any{"exp": -1}), ""},
		"exp is null":                 {rawHS256([]byte(secret), `{"alg":"HS256"}`, `{"sub":"alice","exp":null}`), ""},
		"exp beyond any time":         {rawHS256([]byte(secret), `{"alg":"HS256"}`, `{"sub":"alice","exp":1e300}`), ""},
		"exp in the year 10000":       {hs(nil, map[string]any{"exp": int64(253_402_300_800)}), ""},
		"nbf within the leeway":       {hs(nil, map[string]any{"nbf": at(59 * time.Second)}), "alice"},
		"nbf in the future":           {hs(nil, map[string]any{"nbf": at(62 * time.Second)}), ""},
		"nbf is text":                 {hs(nil, map[string]any{"nbf": "soon"}), ""},
		"iat within the leeway":       {hs(nil, map[string]any{"iat": at(59 * time.Second)}), "alice"},
		"iat in the future":           {hs(nil, map[string]any{"iat": at(62 * time.Second)}), ""},
		"iat is text":                 {hs(nil, map[string]any{"iat": "now"}), ""},
		"iat missing":                 {hs(nil, map[string]any{"iat": nil}), "alice"},
		"sub missing":                 {hs(nil, map[string]any{"sub": nil}), ""},
		"sub empty":                   {hs(nil, map[string]any{"sub": ""}), ""},
		"sub is a number":             {hs(nil, map[string]any{"sub": 7}), ""},
		"sub of 256 bytes":            {hs(nil, map[string]any{"sub": strings.Repeat("é", 128)}), strings.Repeat("é", 128)},
		"sub of 257 bytes":            {hs(nil, map[string]any{"sub": strings.Repeat("é", 128) + "x"}), ""},
		"sub with CR LF":              {hs(nil, map[string]any{"sub": "a\r\nb"}), ""},
		"sub with NUL":                {hs(nil, map[string]any{"sub": "a\x00"}), ""},
		"sub with ANSI":               {hs(nil, map[string]any{"sub": "\x1b[31mroot"}), ""},
		"sub of invalid UTF-8":        {rawHS256([]byte(secret), `{"alg":"HS256"}`, "{\"sub\":\"a\xff\",\"exp\":"+fmt.Sprint(at(time.Hour))+"}"), ""},
		"sub with a lone surrogate":   {rawHS256([]byte(secret), `{"alg":"HS256"}`, `{"sub":"a\ud800","exp":`+fmt.Sprint(at(time.Hour))+"}"), ""},
		"other claim invalid UTF-8":   {rawHS256([]byte(secret), `{"alg":"HS256"}`, "{"+payload+",\"x\":\"\xff\"}"), ""},
		"roles":                       {hs(nil, map[string]any{"roles": []string{"a", "b"}}), "alice"},
		"roles is text":               {hs(nil, map[string]any{"roles": "admin"}), ""},
		"roles holds a number":        {hs(nil, map[string]any{"roles": []any{"a", 1}}), ""},
		"typ at+jwt":                  {hs(map[string]any{"typ": "at+jwt"}, nil), "alice"},
		"typ in lower case":           {hs(map[string]any{"typ": "jwt"}, nil), "alice"},
		"typ absent":                  {rawHS256([]byte(secret), `{"alg":"HS256"}`, "{"+payload+"}"), "alice"},
		"typ of another token":        {hs(map[string]any{"typ": "dpop+jwt"}, nil), ""},
		"typ is a number":             {hs(map[string]any{"typ": 1}, nil), ""},
		"crit":                        {hs(map[string]any{"crit": []string{"b64"}}, nil), ""},
		"kid with a path":             {hs(map[string]any{"kid": "../../../../dev/null"}, nil), "alice"}, // one key, so kid selects nothing
		"kid is a number":             {hs(map[string]any{"kid": 5}, nil), ""},
		"alg none":                    {none("none"), ""},
		"alg None":                    {none("None"), ""},
		"alg NONE":                    {none("NONE"), ""},
		"alg nOnE":                    {none("nOnE"), ""},
		"alg empty":                   {none(""), ""},
		"alg missing":                 {rawHS256([]byte(secret), `{"typ":"JWT"}`, "{"+payload+"}"), ""},
		"alg lower case":              {rawHS256([]byte(secret), `{"alg":"hs256"}`, "{"+payload+"}"), ""},
		"alg HS384":                   {sign(jwt.SigningMethodHS384, []byte(secret), nil, claims(nil)), ""},
		"alg RS256":                   {sign(jwt.SigningMethodRS256, rsaKeys()[0], nil, claims(nil)), ""},
		"empty signature":             {head + "." + body + ".", ""},
		"no signature part":           {head + "." + body, ""},
		"signature of another secret": {sign(jwt.SigningMethodHS256, []byte(secret+"x"), nil, claims(nil)), ""},
		"payload changed":             {head + "." + base64.RawURLEncoding.EncodeToString([]byte("{"+payload+",\"admin\":1}")) + good[strings.LastIndex(good, "."):], ""},
		"padding":                     {good + "=", ""},
		"trailing part":               {good + ".x", ""},
		"trailing JSON":               {rawHS256([]byte(secret), `{"alg":"HS256"}`, "{"+payload+"}{}"), ""},
		"empty":                       {"", ""},
		"dots":                        {"..", ""},
		"not base64":                  {"!.!.!", ""},
		"claims are no object":        {rawHS256([]byte(secret), `{"alg":"HS256"}`, `[1]`), ""},
		"header is no object":         {rawHS256([]byte(secret), `[]`, "{"+payload+"}"), ""},
		"nested a lot":                {rawHS256([]byte(secret), `{"alg":"HS256"}`, strings.Repeat("[", 5000)), ""},
		"1 MB":                        {hs(nil, map[string]any{"pad": strings.Repeat("x", 1<<20)}), ""},
		"issuer is not asked for":     {hs(nil, map[string]any{"iss": "anyone", "aud": "anything"}), "alice"},
	} {
		t.Run(name, func(t *testing.T) {
			principal, err := newVerifier(t, Config{Secret: secret}).Verify(t.Context(), c.token)
			checkVerdict(t, principal, err, c.user)
		})
	}
}

func checkVerdict(t *testing.T, principal Principal, err error, user string) {
	t.Helper()
	if user == "" {
		if err == nil || err.Error() != ErrToken.Error() {
			t.Fatalf("got %+v, %v; want the one refusal", principal, err)
		}
		if principal.UserID != "" || principal.Anonymous {
			t.Fatalf("a refusal names %+v", principal)
		}
		return
	}
	if err != nil || principal.UserID != user || principal.Anonymous {
		t.Fatalf("got %+v, %v; want %q", principal, err, user)
	}
}

func TestVerifySizeIsCheckedBeforeParsing(t *testing.T) {
	v := newVerifier(t, Config{Secret: secret})
	pad := func(total int) string {
		// The token grows by 4 characters per 3 bytes; any good length near the bound will do.
		for n := total/4*3 - 400; ; n++ {
			token := sign(jwt.SigningMethodHS256, []byte(secret), nil, claims(map[string]any{"pad": strings.Repeat("x", n)}))
			if len(token) >= total {
				return token
			}
		}
	}
	if token := pad(MaxTokenBytes - 3); len(token) > MaxTokenBytes {
		t.Fatalf("test token has %d bytes", len(token))
	} else if _, err := v.Verify(t.Context(), token); err != nil {
		t.Errorf("a token of %d bytes: %v", len(token), err)
	}
	if token := pad(MaxTokenBytes + 1); len(token) <= MaxTokenBytes {
		t.Fatalf("test token has %d bytes", len(token))
	} else if _, err := v.Verify(t.Context(), token); err == nil {
		t.Errorf("a token of %d bytes was accepted", len(token))
	}
}

func TestVerifyRolesAndExpiry(t *testing.T) {
	v := newVerifier(t, Config{Secret: secret})
	token := sign(jwt.SigningMethodHS256, []byte(secret), nil, claims(map[string]any{"roles": []string{"a", "b"}}))
	principal, err := v.Verify(t.Context(), token)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(principal.Roles) != "[a b]" || !principal.Expires.Equal(time.Unix(at(time.Hour), 0)) {
		t.Errorf("got %+v", principal)
	}
	// Accepted within the leeway: it has not ended before it began.
	token = sign(jwt.SigningMethodHS256, []byte(secret), nil, claims(map[string]any{"exp": at(-30 * time.Second)}))
	if principal, err = v.Verify(t.Context(), token); err != nil || !principal.Expires.Equal(time.Unix(at(30*time.Second), 0)) {
		t.Errorf("got %+v, %v", principal, err)
	}
}

func TestVerifyPublicKey(t *testing.T) {
	rsaPEM, ecPEM := publicPEM(&rsaKeys()[0].PublicKey), publicPEM(&ecKey().PublicKey)
	rs := sign(jwt.SigningMethodRS256, rsaKeys()[0], nil, claims(nil))
	es := sign(jwt.SigningMethodES256, ecKey(), nil, claims(nil))
	pkcs1 := string(pem.EncodeToMemory(&pem.Block{Type: "RSA PUBLIC KEY", Bytes: x509.MarshalPKCS1PublicKey(&rsaKeys()[0].PublicKey)}))
	for name, c := range map[string]struct {
		key, token, user string
	}{
		"RS256":                            {rsaPEM, rs, "alice"},
		"RS256, PKCS 1":                    {pkcs1, rs, "alice"},
		"RS256, literal newlines":          {strings.ReplaceAll(rsaPEM, "\n", `\n`), rs, "alice"},
		"ES256":                            {ecPEM, es, "alice"},
		"ES256, literal newlines":          {strings.ReplaceAll(ecPEM, "\n", `\n`), es, "alice"},
		"RS256 by another key":             {rsaPEM, sign(jwt.SigningMethodRS256, rsaKeys()[1], nil, claims(nil)), ""},
		"ES256 for an RSA key":             {rsaPEM, es, ""},
		"RS256 for an EC key":              {ecPEM, rs, ""},
		"RS512":                            {rsaPEM, sign(jwt.SigningMethodRS512, rsaKeys()[0], nil, claims(nil)), ""},
		"PS256":                            {rsaPEM, sign(jwt.SigningMethodPS256, rsaKeys()[0], nil, claims(nil)), ""},
		"HMAC with the public key":         {rsaPEM, sign(jwt.SigningMethodHS256, []byte(rsaPEM), nil, claims(nil)), ""},
		"HMAC with the trimmed public key": {rsaPEM, sign(jwt.SigningMethodHS256, []byte(strings.TrimSpace(rsaPEM)), nil, claims(nil)), ""},
		"HMAC with the EC public key":      {ecPEM, sign(jwt.SigningMethodHS256, []byte(ecPEM), nil, claims(nil)), ""},
	} {
		t.Run(name, func(t *testing.T) {
			principal, err := newVerifier(t, Config{Secret: c.key}).Verify(t.Context(), c.token)
			checkVerdict(t, principal, err, c.user)
		})
	}
}

func TestVerifyIssuerAndAudience(t *testing.T) {
	v := newVerifier(t, Config{Secret: secret, Issuer: "https://issuer", Audience: "topgun"})
	for name, c := range map[string]struct {
		iss, aud any
		user     string
	}{
		"both":              {"https://issuer", "topgun", "alice"},
		"one of several":    {"https://issuer", []string{"x", "topgun"}, "alice"},
		"wrong issuer":      {"https://issuer/", "topgun", ""},
		"missing issuer":    {nil, "topgun", ""},
		"wrong audience":    {"https://issuer", "topgun2", ""},
		"missing audience":  {"https://issuer", nil, ""},
		"empty audiences":   {"https://issuer", []string{}, ""},
		"audience a number": {"https://issuer", 1, ""},
		"issuer a list":     {[]string{"https://issuer"}, "topgun", ""},
	} {
		t.Run(name, func(t *testing.T) {
			token := sign(jwt.SigningMethodHS256, []byte(secret), nil, claims(map[string]any{"iss": c.iss, "aud": c.aud}))
			principal, err := v.Verify(t.Context(), token)
			checkVerdict(t, principal, err, c.user)
		})
	}
}

func TestVerifyWithoutKeyIsAnonymous(t *testing.T) {
	v := newVerifier(t, Config{})
	if v.Required() {
		t.Fatal("a token is required")
	}
	for _, token := range []string{"", "anything"} {
		principal, err := v.Verify(t.Context(), token)
		if err != nil || !principal.Anonymous || principal.UserID != "" || !principal.Expires.IsZero() {
			t.Errorf("token %q: %+v, %v", token, principal, err)
		}
	}
}

func TestShortSecretIsWarnedOf(t *testing.T) {
	for length, want := range map[int]bool{31: true, 32: false} {
		var lines bytes.Buffer
		logger := slog.New(slog.NewTextHandler(&lines, nil))
		must(New(Config{Secret: strings.Repeat("x", length)}, Deps{Logger: logger}))
		if got := strings.Contains(lines.String(), "short"); got != want {
			t.Errorf("%d bytes: warned %t, want %t", length, got, want)
		}
	}
}

func TestValidate(t *testing.T) {
	small := must(rsa.GenerateKey(rand.Reader, 1024))
	p384 := must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	private := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(ecKey()))}))
	for name, c := range map[string]struct {
		cfg  Config
		want string // part of the error; empty: valid
	}{
		"nothing":               {Config{}, ""},
		"32 bytes":              {Config{Secret: strings.Repeat("x", 32)}, ""},
		"short secret":          {Config{Secret: "short"}, ""},
		"cut PEM":               {Config{Secret: "-----BEGIN PUBLIC KEY-----\nAAAA"}, "whole PEM"},
		"PEM of garbage":        {Config{Secret: string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: []byte("x")}))}, "cannot be read"},
		"private key":           {Config{Secret: private}, "private key"},
		"small RSA key":         {Config{Secret: publicPEM(&small.PublicKey)}, "at least 2048"},
		"other curve":           {Config{Secret: publicPEM(&p384.PublicKey)}, "P-256"},
		"two keys":              {Config{Secret: secret, JWKSURL: "https://issuer/jwks"}, "both set"},
		"issuer without key":    {Config{Issuer: "x"}, "no key"},
		"JWKS":                  {Config{JWKSURL: "https://issuer/jwks"}, ""},
		"JWKS over http":        {Config{JWKSURL: "http://issuer/jwks"}, "want https"},
		"JWKS on loopback":      {Config{JWKSURL: "http://127.0.0.1:9/jwks"}, ""},
		"JWKS in a file":        {Config{JWKSURL: "file:///etc/passwd"}, "want https"},
		"JWKS with password":    {Config{JWKSURL: "https://u:p@issuer/jwks"}, "without user"},
		"JWKS is no URL":        {Config{JWKSURL: "::"}, "want https"},
		"negative intervals":    {Config{JWKSURL: "https://i/j", JWKSRefresh: -1}, "negative"},
		"PEM, spaces before it": {Config{Secret: "\n " + publicPEM(&ecKey().PublicKey)}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := c.cfg.Validate()
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Fatalf("got %v, want %q", err, c.want)
			}
			if err != nil && c.cfg.Secret != "" && strings.Contains(err.Error(), c.cfg.Secret) {
				t.Error("the error repeats the secret (SEC-05)")
			}
		})
	}
}

// TestReasonsAreCounted: the cause is in the metric, and only there.
func TestReasonsAreCounted(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	v, err := New(Config{Secret: secret}, Deps{
		Now:   func() time.Time { return now },
		Meter: sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)).Meter("test"),
	})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"expired":       sign(jwt.SigningMethodHS256, []byte(secret), nil, claims(map[string]any{"exp": at(-time.Hour)})),
		"not_yet_valid": sign(jwt.SigningMethodHS256, []byte(secret), nil, claims(map[string]any{"nbf": at(time.Hour)})),
		"signature":     sign(jwt.SigningMethodHS256, []byte(secret+"x"), nil, claims(nil)),
		"malformed":     "x",
		"absent":        "",
		"too_long":      strings.Repeat("x", MaxTokenBytes+1),
		"subject":       sign(jwt.SigningMethodHS256, []byte(secret), nil, claims(map[string]any{"sub": ""})),
		"header":        sign(jwt.SigningMethodHS256, []byte(secret), map[string]any{"typ": "x"}, claims(nil)),
		"claims":        sign(jwt.SigningMethodHS256, []byte(secret), nil, claims(map[string]any{"exp": nil})),
	}
	for _, token := range want {
		if _, err := v.Verify(t.Context(), token); !errors.Is(err, ErrToken) {
			t.Fatal(err)
		}
	}
	var got metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &got); err != nil {
		t.Fatal(err)
	}
	seen := map[string]int64{}
	for _, point := range got.ScopeMetrics[0].Metrics[0].Data.(metricdata.Sum[int64]).DataPoints {
		reason, _ := point.Attributes.Value(attribute.Key("reason"))
		seen[reason.AsString()] = point.Value
	}
	for reason := range want {
		if seen[reason] != 1 {
			t.Errorf("reason %s was counted %d times; all: %v", reason, seen[reason], seen)
		}
	}
}

func TestThrottle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, err := New(Config{Secret: secret}, Deps{Now: time.Now})
		if err != nil {
			t.Fatal(err)
		}
		attacker := WithAddress(t.Context(), netip.MustParseAddr("203.0.113.7"))
		took := func(ctx context.Context, token string) time.Duration {
			begin := time.Now()
			_, _ = v.Verify(ctx, token)
			return time.Since(begin)
		}
		for i := range freeFailures {
			if d := took(attacker, "wrong"); d != 0 {
				t.Fatalf("failure %d was delayed by %v", i+1, d)
			}
		}
		if d := took(attacker, "wrong"); d != firstDelay {
			t.Errorf("the first slowed failure took %v", d)
		}
		for range 20 {
			took(attacker, "wrong")
		}
		if d := took(attacker, "wrong"); d != maxDelay {
			t.Errorf("a late failure took %v", d)
		}
		// Others, and good tokens of the same address, are not slowed.
		if d := took(WithAddress(t.Context(), netip.MustParseAddr("203.0.113.8")), "wrong"); d != 0 {
			t.Errorf("another address was delayed by %v", d)
		}
		good := sign(jwt.SigningMethodHS256, []byte(secret), nil, jwt.MapClaims{"sub": "a", "exp": time.Now().Add(time.Hour).Unix()})
		if d := took(attacker, good); d != 0 {
			t.Errorf("a good token was delayed by %v", d)
		}
		// An IPv6 /64 is one party; its neighbours are not.
		for i := range freeFailures {
			took(WithAddress(t.Context(), netip.MustParseAddr(fmt.Sprintf("2001:db8::%d", i+1))), "wrong")
		}
		if d := took(WithAddress(t.Context(), netip.MustParseAddr("2001:db8::99")), "wrong"); d != firstDelay {
			t.Errorf("an address of the same /64 was delayed by %v", d)
		}
		if d := took(WithAddress(t.Context(), netip.MustParseAddr("2001:db8:0:1::1")), "wrong"); d != 0 {
			t.Errorf("an address of another /64 was delayed by %v", d)
		}
		// A client that goes away is not held.
		ctx, cancel := context.WithCancel(attacker)
		cancel()
		if d := took(ctx, "wrong"); d != 0 {
			t.Errorf("a cancelled call took %v", d)
		}
		sleep(t.Context(), forgetAfter+time.Second)
		if d := took(attacker, "wrong"); d != 0 {
			t.Errorf("after a quiet minute a failure took %v", d)
		}
	})
}

func TestThrottleIsBounded(t *testing.T) {
	throttle := newThrottle(func() time.Time { return now })
	first := netip.MustParseAddr("10.0.0.0")
	for addr, i := first, 0; i < maxAddresses*2; addr, i = addr.Next(), i+1 {
		throttle.failed(addr)
	}
	if len(throttle.byAddr) != maxAddresses || throttle.order.Len() != maxAddresses {
		t.Errorf("the table holds %d addresses, its order %d", len(throttle.byAddr), throttle.order.Len())
	}
}

// issuer is a real JWKS server whose keys and health a test changes.
type issuer struct {
	*httptest.Server
	mu      sync.Mutex
	body    string
	status  int
	fetches int
}

func newIssuer(t *testing.T, keys ...any) *issuer {
	i := &issuer{status: http.StatusOK}
	i.set(keys...)
	i.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		i.mu.Lock()
		defer i.mu.Unlock()
		i.fetches++
		w.WriteHeader(i.status)
		_, _ = w.Write([]byte(i.body))
	}))
	t.Cleanup(i.Close)
	return i
}

// set publishes public keys under the ids k0, k1, …
func (i *issuer) set(keys ...any) {
	list := []map[string]string{}
	for n, key := range keys {
		list = append(list, jwk(fmt.Sprintf("k%d", n), key))
	}
	i.setBody(http.StatusOK, string(must(json.Marshal(map[string]any{"keys": list}))))
}

func (i *issuer) setBody(status int, body string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.status, i.body = status, body
}

func (i *issuer) count() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.fetches
}

func jwk(kid string, key any) map[string]string {
	b64 := base64.RawURLEncoding.EncodeToString
	switch k := key.(type) {
	case *rsa.PublicKey:
		return map[string]string{"kty": "RSA", "kid": kid, "use": "sig", "alg": "RS256", "n": b64(k.N.Bytes()), "e": "AQAB"}
	case *ecdsa.PublicKey:
		raw := must(k.Bytes()) // 4, then x and y of 32 bytes
		return map[string]string{"kty": "EC", "crv": "P-256", "kid": kid, "use": "sig", "x": b64(raw[1:33]), "y": b64(raw[33:])}
	case []byte:
		return map[string]string{"kty": "oct", "kid": kid, "k": b64(k)}
	}
	panic("no such key")
}

// runVerifier starts Run and stops it at the end of the test.
func runVerifier(t *testing.T, cfg Config, log *slog.Logger) *Verifier {
	t.Helper()
	v, err := New(cfg, Deps{Now: func() time.Time { return now }, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := v.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return v
}

func TestVerifyJWKS(t *testing.T) {
	i := newIssuer(t, &rsaKeys()[0].PublicKey, &ecKey().PublicKey, []byte(secret))
	v := runVerifier(t, Config{JWKSURL: i.URL, JWKSPause: time.Millisecond, JWKSRefresh: time.Hour}, nil)
	rs := func(kid any) string {
		return sign(jwt.SigningMethodRS256, rsaKeys()[0], map[string]any{"kid": kid}, claims(nil))
	}
	for name, c := range map[string]struct{ token, user string }{
		"RS256":                    {rs("k0"), "alice"},
		"ES256":                    {sign(jwt.SigningMethodES256, ecKey(), map[string]any{"kid": "k1"}, claims(nil)), "alice"},
		"RS256 without kid":        {sign(jwt.SigningMethodRS256, rsaKeys()[0], nil, claims(nil)), "alice"},
		"ES256 without kid":        {sign(jwt.SigningMethodES256, ecKey(), nil, claims(nil)), "alice"},
		"kid of the other key":     {rs("k1"), ""},
		"unknown kid":              {rs("k9"), ""},
		"kid with a path":          {rs("../../etc/passwd"), ""},
		"kid with SQL":             {rs("' OR 1=1 --"), ""},
		"kid with a URL":           {rs(i.URL + "/evil"), ""},
		"kid with NUL":             {rs("k0\x00"), ""},
		"kid of 10 KB":             {rs(strings.Repeat("k", 10<<10)), ""},
		"kid of 257 bytes":         {rs(strings.Repeat("k", 257)), ""},
		"kid empty":                {rs(""), ""},
		"kid is a number":          {rs(0), ""},
		"HS256 with an oct key":    {sign(jwt.SigningMethodHS256, []byte(secret), map[string]any{"kid": "k2"}, claims(nil)), ""},
		"HMAC with the public key": {sign(jwt.SigningMethodHS256, []byte(publicPEM(&rsaKeys()[0].PublicKey)), map[string]any{"kid": "k0"}, claims(nil)), ""},
		"RS384":                    {sign(jwt.SigningMethodRS384, rsaKeys()[0], map[string]any{"kid": "k0"}, claims(nil)), ""},
		"its own key in jwk": {sign(jwt.SigningMethodRS256, rsaKeys()[1], map[string]any{
			"jwk": jwk("k0", &rsaKeys()[1].PublicKey),
		}, claims(nil)), ""},
		"its own key at jku": {sign(jwt.SigningMethodRS256, rsaKeys()[1], map[string]any{
			"kid": "k0", "jku": i.URL + "/other",
		}, claims(nil)), ""},
	} {
		t.Run(name, func(t *testing.T) {
			principal, err := v.Verify(t.Context(), c.token)
			checkVerdict(t, principal, err, c.user)
		})
	}
	if err := v.Ready(); err != nil {
		t.Error(err)
	}
}

// TestJWKSRotation: a new key is accepted without a restart, a removed one refused.
func TestJWKSRotation(t *testing.T) {
	i := newIssuer(t, &rsaKeys()[0].PublicKey)
	v := runVerifier(t, Config{JWKSURL: i.URL, JWKSPause: time.Millisecond, JWKSRefresh: time.Hour}, nil)
	old := sign(jwt.SigningMethodRS256, rsaKeys()[0], map[string]any{"kid": "k0"}, claims(nil))
	fresh := sign(jwt.SigningMethodES256, ecKey(), map[string]any{"kid": "k1"}, claims(nil))
	if _, err := v.Verify(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	i.set(&rsaKeys()[0].PublicKey, &ecKey().PublicKey)
	if _, err := v.Verify(t.Context(), fresh); err != nil {
		t.Fatalf("the new key: %v", err)
	}
	i.set(&rsaKeys()[1].PublicKey) // k0 is another key, k1 is gone
	if _, err := v.Verify(t.Context(), sign(jwt.SigningMethodRS256, rsaKeys()[0], map[string]any{"kid": "none"}, claims(nil))); err == nil {
		t.Fatal("an unknown key was accepted")
	}
	for _, token := range []string{old, fresh} {
		if _, err := v.Verify(t.Context(), token); err == nil {
			t.Error("a removed key was accepted")
		}
	}
}

// TestJWKSOutage: the last keys stay in use, and a start without the issuer heals.
func TestJWKSOutage(t *testing.T) {
	i := newIssuer(t)
	i.setBody(http.StatusInternalServerError, "")
	var log bytes.Buffer
	v := runVerifier(t, Config{JWKSURL: i.URL, JWKSPause: time.Millisecond, JWKSRefresh: time.Hour}, slog.New(slog.NewTextHandler(&log, nil)))
	good := sign(jwt.SigningMethodRS256, rsaKeys()[0], map[string]any{"kid": "k0"}, claims(nil))
	if _, err := v.Verify(t.Context(), good); err == nil {
		t.Fatal("accepted without keys")
	}
	if v.Ready() == nil {
		t.Error("ready without keys")
	}
	i.set(&rsaKeys()[0].PublicKey)
	if _, err := v.Verify(t.Context(), good); err != nil {
		t.Fatalf("after the issuer came back: %v", err)
	}
	unknown := sign(jwt.SigningMethodRS256, rsaKeys()[1], map[string]any{"kid": "k9"}, claims(nil))
	for name, body := range map[string]string{
		"an error page": "<html>", "no keys": "{}", "keys is no list": `{"keys":1}`,
		"a bomb": `{"keys":[` + strings.Repeat(" ", maxSetBytes) + `]}`,
	} {
		i.setBody(http.StatusOK, body)
		if _, err := v.Verify(t.Context(), unknown); err == nil { // waits for a fetch
			t.Fatal("an unknown key was accepted")
		}
		if _, err := v.Verify(t.Context(), good); err != nil {
			t.Errorf("during an outage (%s): %v", name, err)
		}
	}
	i.set() // an empty list is no outage: the issuer withdrew its keys
	if _, err := v.Verify(t.Context(), unknown); err == nil {
		t.Fatal("an unknown key was accepted")
	}
	if _, err := v.Verify(t.Context(), good); err == nil {
		t.Error("a withdrawn key was accepted")
	}
}

// TestJWKSUnknownKidDoesNotExhaust: bogus key ids cause at most one fetch per pause,
// and a token of a new key is accepted in the middle of them.
func TestJWKSUnknownKidDoesNotExhaust(t *testing.T) {
	const pause = 50 * time.Millisecond
	i := newIssuer(t, &rsaKeys()[0].PublicKey)
	v := runVerifier(t, Config{JWKSURL: i.URL, JWKSPause: pause, JWKSRefresh: time.Hour}, nil)
	begin := time.Now()
	bogus := sign(jwt.SigningMethodRS256, rsaKeys()[1], map[string]any{"kid": "bogus"}, claims(nil))
	var flood sync.WaitGroup
	for range 50 {
		flood.Go(func() {
			for range 3 {
				_, _ = v.Verify(t.Context(), bogus)
			}
		})
	}
	i.set(&rsaKeys()[0].PublicKey, &ecKey().PublicKey)
	fresh := sign(jwt.SigningMethodES256, ecKey(), map[string]any{"kid": "k1"}, claims(nil))
	if _, err := v.Verify(t.Context(), fresh); err != nil {
		t.Errorf("the new key was refused: %v", err)
	}
	flood.Wait()
	if most := int(time.Since(begin)/pause) + 2; i.count() > most {
		t.Errorf("%d fetches in %v, want at most %d", i.count(), time.Since(begin), most)
	}
}

// TestJWKSRedirectIsNotFollowed: only the configured address is ever asked.
func TestJWKSRedirectIsNotFollowed(t *testing.T) {
	elsewhere := newIssuer(t, &rsaKeys()[0].PublicKey)
	redirect := httptest.NewServer(http.RedirectHandler(elsewhere.URL, http.StatusFound))
	t.Cleanup(redirect.Close)
	v := runVerifier(t, Config{JWKSURL: redirect.URL, JWKSPause: time.Millisecond}, nil)
	token := sign(jwt.SigningMethodRS256, rsaKeys()[0], map[string]any{"kid": "k0"}, claims(nil))
	if _, err := v.Verify(t.Context(), token); err == nil || elsewhere.count() != 0 {
		t.Errorf("verify: %v, and %d requests elsewhere", err, elsewhere.count())
	}
}
