package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// HTTPServer returns a server for handler that speaks HTTP/1.1 and HTTP/2 without
// TLS, reads headers of at most 32 KiB within 5 seconds, and closes connections
// that are idle for two minutes. It sets no deadline for bodies: streams live long.
// Run it with Serve.
func HTTPServer(handler http.Handler, logger *slog.Logger) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	return &http.Server{
		Handler:           handler,
		Protocols:         protocols,
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    32 << 10,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: 1024,
			SendPingTimeout:      15 * time.Second,
			PingTimeout:          5 * time.Second,
		},
		ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelWarn),
	}
}

// Serve serves connections from listener until ctx ends. Then it stops accepting,
// lets calls in flight finish for at most grace, closes the connections of those that
// are left, which cancels their contexts, and returns nil. Handlers that do not heed
// their context may outlive it. It returns an error when listening fails. It owns
// listener and server.
func Serve(ctx context.Context, server *http.Server, listener net.Listener, grace time.Duration) error {
	base, cancel := context.WithCancel(context.WithValue(context.WithoutCancel(ctx), stoppingKey{}, ctx.Done()))
	defer cancel()
	server.BaseContext = func(net.Listener) context.Context { return base }

	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve %s: %w", listener.Addr(), err)
	case <-ctx.Done():
	}
	graceful, stop := context.WithTimeout(base, grace)
	defer stop()
	err := server.Shutdown(graceful)
	if errors.Is(err, context.DeadlineExceeded) {
		err = server.Close()
	}
	if end := <-served; !errors.Is(end, http.ErrServerClosed) {
		err = errors.Join(err, end)
	}
	if err != nil {
		return fmt.Errorf("stop serving %s: %w", listener.Addr(), err)
	}
	return nil
}

type stoppingKey struct{}

// stopping is closed when the server that carries a call begins to stop, so that
// streams which would never end do not use up the grace of the others. It is nil,
// and blocks for ever, for calls in process.
func stopping(ctx context.Context) <-chan struct{} {
	done, _ := ctx.Value(stoppingKey{}).(<-chan struct{})
	return done
}
