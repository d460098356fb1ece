// Package auth decides who a client is: it verifies the token that a client
// presents (PROTOCOL 3.4) and names the principal.
//
// It owns the keys (one shared secret, one public key, or a JWKS that it keeps
// fresh), the rules that a token must satisfy (RELIABILITY 4), and the slowing
// down of addresses that present many wrong tokens. Identity comes from a
// verified token only (SEC-02), and no token, claim or key appears in an error,
// a log line or a metric (SEC-05).
//
// It does not decide what a principal may do, and it never fetches anything that
// a token names: the only network access is to the configured JWKS URL.
package auth
