// Package broker connects to NATS, and runs a NATS server inside the process for
// the one binary and for tests.
//
// It owns how a connection behaves: it reconnects for ever, buffers nothing while it
// is away (a publisher learns that at once and knows that nothing was sent), and
// reports in the log. What travels over connections belongs to packages commitlog
// and bus.
package broker
