package cli

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/topgun-sync/topgun/services/gateway"
	"github.com/topgun-sync/topgun/services/gateway/auth"
)

// Access are the flags that say who may connect to a gateway.
type Access struct {
	JWTSecretFile string   `name:"jwt-secret-file" env:"TOPGUN_JWT_SECRET_FILE" type:"path" placeholder:"FILE" help:"File with the HS256 secret, or with a PEM public key for RS256 or ES256, that tokens are checked with. The secret itself may stand in the environment as JWT_SECRET."`
	JWKSURL       string   `name:"jwks-url" env:"TOPGUN_JWKS_URL" placeholder:"URL" help:"Where the public keys for RS256 and ES256 are fetched."`
	JWTIssuer     string   `name:"jwt-issuer" env:"TOPGUN_JWT_ISSUER" placeholder:"ISS" help:"The iss that a token must have."`
	JWTAudience   string   `name:"jwt-audience" env:"TOPGUN_JWT_AUDIENCE" placeholder:"AUD" help:"An aud that a token must have."`
	NoAuth        bool     `name:"no-auth" env:"TOPGUN_NO_AUTH" help:"Serve everybody, on any address. Without a key and without this, only a loopback address is served."`
	AllowOrigin   []string `name:"allow-origin" env:"TOPGUN_ALLOW_ORIGIN" placeholder:"ORIGIN" help:"Origin of web pages that may connect, besides the server's own and loopback ones; * allows all."`
}

// maxSecretBytes bounds the secret file; the largest sensible one is a PEM key.
const maxSecretBytes = 64 << 10

// Apply puts the flags into a gateway's configuration. JWT_SECRET is read from the
// environment here and not as a flag, so that no secret ever stands among the
// arguments of a process.
func (a Access) Apply(config *gateway.Config) error {
	secret := os.Getenv("JWT_SECRET")
	if a.JWTSecretFile != "" {
		if secret != "" {
			return errors.New("--jwt-secret-file and JWT_SECRET are both set: remove one")
		}
		info, err := os.Stat(a.JWTSecretFile)
		if err != nil {
			return fmt.Errorf("read the JWT secret: %w", err)
		}
		if info.Size() > maxSecretBytes {
			return fmt.Errorf("read the JWT secret: %s is larger than 64 KiB", a.JWTSecretFile)
		}
		content, err := os.ReadFile(a.JWTSecretFile)
		if err != nil {
			return fmt.Errorf("read the JWT secret: %w", err)
		}
		if secret = strings.TrimSpace(string(content)); secret == "" {
			return fmt.Errorf("read the JWT secret: %s is empty", a.JWTSecretFile)
		}
	}
	config.NoAuth = a.NoAuth
	config.Auth = auth.Config{Secret: secret, JWKSURL: a.JWKSURL, Issuer: a.JWTIssuer, Audience: a.JWTAudience}
	config.AllowedOrigins = a.AllowOrigin
	return nil
}
