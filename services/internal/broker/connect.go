package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// dialTimeout bounds one attempt to connect.
	dialTimeout = 2 * time.Second
	// retryWait is the pause between attempts, and retryJitter what chance adds, so
	// that many processes do not come back at the same moment.
	retryWait = 250 * time.Millisecond
	// complainEvery is how often the log says that the first connection is waited for.
	complainEvery = 10 * time.Second
	retryJitter   = 250 * time.Millisecond
	// pingInterval with two unanswered pings finds a half-open connection in ten
	// seconds (SYN-06).
	pingInterval = 5 * time.Second
)

// Conn is a connection to a broker, under a name for those who only pass it on.
type Conn = nats.Conn

// Connect connects to the NATS servers at rawURL, one URL or several separated by
// commas. It waits for the first connection until ctx ends; a server that refuses
// the credentials ends the wait at once. name shows up in the server's monitoring.
// Errors and logs name the servers without their passwords. The caller closes the
// connection.
func Connect(ctx context.Context, rawURL, name string, logger *slog.Logger) (*nats.Conn, error) {
	shown, err := redact(rawURL)
	if err != nil {
		return nil, err
	}
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	return connect(ctx, rawURL, shown, logger, options(name, shown, logger))
}

func connect(ctx context.Context, rawURL, shown string, logger *slog.Logger, opts []nats.Option) (*nats.Conn, error) {
	var last error
	complained := time.Time{}
	for {
		nc, err := nats.Connect(rawURL, opts...)
		if err == nil {
			if ctx.Err() != nil {
				nc.Close()
				return nil, fmt.Errorf("connect to the broker at %s: %w", shown, ctx.Err())
			}
			return nc, nil
		}
		if errors.Is(err, nats.ErrAuthorization) || errors.Is(err, nats.ErrAuthExpired) || errors.Is(err, nats.ErrAuthRevoked) {
			return nil, fmt.Errorf("connect to the broker at %s: %w", shown, err)
		}
		last = err
		if time.Since(complained) >= complainEvery {
			complained = time.Now()
			logger.Warn("waiting for the broker", "broker", shown, "error", err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("the broker at %s is unreachable: %w (%w)", shown, last, ctx.Err())
		case <-time.After(retryWait):
		}
	}
}

// options are the same for every connection of ours.
func options(name, shown string, logger *slog.Logger) []nats.Option {
	logger = logger.With("connection", name)
	return []nats.Option{
		nats.Name(name),
		nats.Timeout(dialTimeout),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(retryWait),
		nats.ReconnectJitter(retryJitter, retryJitter),
		nats.PingInterval(pingInterval),
		nats.MaxPingsOutstanding(2),
		// A negative size turns the buffer off: a write that waits in a client's
		// memory has an unknown fate, one that was refused has none.
		nats.ReconnectBufSize(-1),
		// Wrong credentials may be put right while we are away; a process that
		// gave up would need a human.
		nats.IgnoreAuthErrorAbort(),
		nats.NoCallbacksAfterClientClose(),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			logger.Warn("broker connection lost", "broker", shown, "error", text(err))
		}),
		nats.ReconnectHandler(func(*nats.Conn) {
			logger.Info("broker connection restored", "broker", shown)
		}),
		nats.ErrorHandler(func(_ *nats.Conn, sub *nats.Subscription, err error) {
			subject := ""
			if sub != nil {
				subject = sub.Subject
			}
			logger.Warn("broker error", "subject", subject, "error", text(err))
		}),
	}
}

func text(err error) string {
	if err == nil {
		return "closed"
	}
	return err.Error()
}

// redact checks a list of server URLs and takes their secrets out.
func redact(rawURL string) (string, error) {
	var shown []string
	for part := range strings.SplitSeq(rawURL, ",") {
		u, err := url.Parse(strings.TrimSpace(part))
		// The parser's own error repeats its input, password and all.
		if err != nil || u.Host == "" || (u.Scheme != "nats" && u.Scheme != "tls") {
			return "", errors.New("the broker URL is not valid: want nats://host:port or tls://host:port, several separated by commas")
		}
		shown = append(shown, u.Scheme+"://"+u.Host)
	}
	return strings.Join(shown, ","), nil
}
