package auth

import (
	"cmp"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/MicahParks/jwkset"
	"github.com/MicahParks/keyfunc/v3"
	"github.com/golang-jwt/jwt/v5"
)

const (
	defaultRefresh = 5 * time.Minute
	defaultPause   = 5 * time.Second
	fetchTimeout   = 5 * time.Second
	maxSetBytes    = 1 << 20
	// maxKeys bounds what a token without key id costs: every key may be tried.
	maxKeys       = 32
	maxKeyIDBytes = 256
	// maxWaiters bounds the tokens that wait for keys to be fetched; one more is
	// refused at once, and its client tries again.
	maxWaiters = 256
)

var errNoKey = errors.New("no such signing key")

// keySet holds the public keys of a JWKS URL. Fetches are made by run alone, one
// at a time and at least a pause apart.
type keySet struct {
	url      string
	client   *http.Client
	refresh  time.Duration
	pause    time.Duration
	keys     *jwkset.MemoryJWKSet
	lookup   keyfunc.Keyfunc
	log      *slog.Logger
	ask      chan struct{} // holds one request for a fetch
	waiters  chan struct{} // holds one element per waiting token
	mu       sync.Mutex
	next     chan struct{} // closed when the next fetch to begin has ended
	ever     bool          // some fetch succeeded
	failures int           // fetches that failed since one succeeded
}

func checkJWKSURL(raw string) error {
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || u.User != nil || (u.Scheme != "https" && u.Scheme != "http") {
		return errors.New("JWKS URL: want https://host/path without user or password")
	}
	if u.Scheme == "http" && !isLoopback(u.Hostname()) {
		return errors.New("JWKS URL: want https; http is accepted for a loopback address only, as who can change the answer can sign in as anybody")
	}
	return nil
}

func isLoopback(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap().IsLoopback()
}

func newKeySet(cfg Config, deps Deps) (*keySet, error) {
	s := &keySet{
		url: cfg.JWKSURL,
		client: &http.Client{
			Timeout: fetchTimeout,
			Transport: &http.Transport{
				Proxy:                  http.ProxyFromEnvironment,
				DialContext:            (&net.Dialer{Timeout: fetchTimeout}).DialContext,
				ForceAttemptHTTP2:      true,
				MaxIdleConns:           1,
				IdleConnTimeout:        time.Minute,
				MaxResponseHeaderBytes: 32 << 10,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error {
				return errors.New("the JWKS URL redirects; configure the final address")
			},
		},
		refresh: cmp.Or(cfg.JWKSRefresh, defaultRefresh),
		pause:   cmp.Or(cfg.JWKSPause, defaultPause),
		keys:    jwkset.NewMemoryStorage(),
		log:     deps.Logger,
		ask:     make(chan struct{}, 1),
		waiters: make(chan struct{}, maxWaiters),
		next:    make(chan struct{}),
	}
	lookup, err := keyfunc.New(keyfunc.Options{Storage: s.keys})
	if err != nil {
		return nil, fmt.Errorf("make the key lookup: %w", err)
	}
	s.lookup = lookup
	return s, nil
}

func (s *keySet) loaded() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ever
}

// key returns the key that must have signed t. When there is none it has the set
// fetched again, waits for that, and looks once more: the issuer may have begun to
// use a new key.
func (s *keySet) key(ctx context.Context, t *jwt.Token) (any, error) {
	if key, err := s.find(ctx, t); err == nil {
		return key, nil
	}
	if !s.fetched(ctx) {
		return nil, errNoKey
	}
	return s.find(ctx, t)
}

func (s *keySet) find(ctx context.Context, t *jwt.Token) (any, error) {
	found, err := s.lookup.KeyfuncCtx(ctx)(t)
	if err != nil {
		return nil, errNoKey
	}
	// Without a key id every key of the algorithm is a candidate.
	if set, ok := found.(jwt.VerificationKeySet); ok {
		var candidates jwt.VerificationKeySet
		for _, key := range set.Keys {
			if methodOf(key) == t.Method.Alg() {
				candidates.Keys = append(candidates.Keys, key)
			}
		}
		if len(candidates.Keys) == 0 {
			return nil, errNoKey
		}
		return candidates, nil
	}
	return found, nil // the parser refuses a key of another kind than the algorithm's
}

// fetched asks for a fetch and reports whether one that began after the call has
// ended in time.
func (s *keySet) fetched(ctx context.Context) bool {
	select {
	case s.waiters <- struct{}{}:
		defer func() { <-s.waiters }()
	default:
		return false
	}
	s.mu.Lock()
	ended := s.next
	s.mu.Unlock()
	select {
	case s.ask <- struct{}{}:
	default: // one is asked for already, and it has not begun
	}
	limit := time.NewTimer(s.pause + fetchTimeout)
	defer limit.Stop()
	select {
	case <-ended:
		return true
	case <-limit.C:
	case <-ctx.Done():
	}
	return false
}

// run fetches the keys now, then at every refresh and when asked, until ctx ends.
func (s *keySet) run(ctx context.Context) {
	defer s.client.CloseIdleConnections()
	for {
		s.fetch(ctx)
		// The pause holds whoever asks, so it also paces retries after a failure.
		if !sleep(ctx, s.pause) {
			return
		}
		rest := s.refresh - s.pause
		if s.failing() {
			rest = 0
		}
		timer := time.NewTimer(max(rest, 0))
		select {
		case <-timer.C:
		case <-s.ask:
		case <-ctx.Done():
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

func (s *keySet) failing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failures > 0
}

// fetch replaces the keys. When it fails the keys stay: an outage of the issuer
// must not end everybody's sessions.
func (s *keySet) fetch(ctx context.Context) {
	// Taking the request first and the channel second may cause one fetch too many,
	// never one too few: who takes the later channel asks after it took it.
	select {
	case <-s.ask:
	default:
	}
	s.mu.Lock()
	ended := s.next
	s.next = make(chan struct{})
	s.mu.Unlock()
	defer close(ended)

	keys, err := s.read(ctx)
	if err == nil {
		err = s.keys.KeyReplaceAll(ctx, keys)
	}
	if ctx.Err() != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.failures++
		if s.failures == 1 { // one line per outage
			s.log.Error("signing keys could not be fetched; the last ones stay in use", "error", err)
		}
		return
	}
	if s.failures > 0 || !s.ever {
		s.log.Info("signing keys fetched", "keys", len(keys))
	}
	s.failures, s.ever = 0, true
}

func (s *keySet) read(ctx context.Context) ([]jwkset.JWK, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url, nil)
	if err != nil {
		return nil, fmt.Errorf("make the JWKS request: %w", err)
	}
	request.Header.Set("Accept", "application/jwk-set+json, application/json")
	response, err := s.client.Do(request)
	if err != nil {
		return nil, fmt.Errorf("fetch the JWKS: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("fetch the JWKS: status %d", response.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(response.Body, maxSetBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read the JWKS: %w", err)
	}
	if len(body) > maxSetBytes {
		return nil, fmt.Errorf("read the JWKS: larger than %d bytes", maxSetBytes)
	}
	var set struct {
		Keys *[]jwkset.JWKMarshal `json:"keys"`
	}
	if err := json.Unmarshal(body, &set); err != nil {
		return nil, errors.New("read the JWKS: not a JSON object with an array named keys")
	}
	if set.Keys == nil {
		return nil, errors.New("read the JWKS: no array named keys")
	}
	var keys []jwkset.JWK
	for _, marshal := range *set.Keys {
		if marshal.USE != "" && marshal.USE != jwkset.UseSig {
			continue
		}
		key, err := jwkset.NewJWKFromMarshal(marshal, jwkset.JWKMarshalOptions{}, jwkset.JWKValidateOptions{})
		if err != nil {
			continue // a kind of key that we do not use; it must not hide the others
		}
		public, ok := key.Key().(crypto.PublicKey)
		if !ok || methodOf(public) == "" {
			continue
		}
		keys = append(keys, key)
	}
	if len(keys) > maxKeys {
		return nil, fmt.Errorf("read the JWKS: more than %d signing keys", maxKeys)
	}
	return keys, nil
}

// sleep reports whether the time passed before ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
