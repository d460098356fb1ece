package auth

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	"github.com/golang-jwt/jwt/v5"
)

const minRSABits = 2048

// parseSecret returns the only algorithm that a configured secret verifies, and
// its key. Errors never repeat the secret.
func parseSecret(secret string) (method string, key any, err error) {
	if !strings.HasPrefix(strings.TrimSpace(secret), "-----BEGIN") {
		return jwt.SigningMethodHS256.Alg(), []byte(secret), nil
	}
	// Environment variables often carry a PEM on one line.
	block, _ := pem.Decode([]byte(strings.ReplaceAll(strings.TrimSpace(secret), `\n`, "\n")))
	if block == nil {
		return "", nil, errors.New("JWT public key: is not a whole PEM block; want -----BEGIN PUBLIC KEY-----")
	}
	if strings.Contains(block.Type, "PRIVATE") {
		return "", nil, errors.New("JWT public key: is a private key, which the gateway must not hold; give the public half")
	}
	public, err := parsePublic(block)
	if err != nil {
		return "", nil, errors.New("JWT public key: cannot be read; want a PEM of type PUBLIC KEY, RSA PUBLIC KEY or CERTIFICATE")
	}
	method = methodOf(public)
	if method == "" {
		return "", nil, fmt.Errorf("JWT public key: want RSA of at least %d bits (RS256) or P-256 (ES256)", minRSABits)
	}
	return method, public, nil
}

func parsePublic(block *pem.Block) (any, error) {
	switch block.Type {
	case "RSA PUBLIC KEY":
		return x509.ParsePKCS1PublicKey(block.Bytes)
	case "CERTIFICATE":
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		return certificate.PublicKey, nil
	default:
		return x509.ParsePKIXPublicKey(block.Bytes)
	}
}

// methodOf returns the algorithm that a public key verifies, or "" if it is not one
// that tokens may be signed with.
func methodOf(key any) string {
	switch k := key.(type) {
	case *rsa.PublicKey:
		if k.N.BitLen() >= minRSABits {
			return jwt.SigningMethodRS256.Alg()
		}
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() {
			return jwt.SigningMethodES256.Alg()
		}
	}
	return ""
}
