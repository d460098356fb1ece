// Package client is the Go SDK of TopGun: local maps that sync with a server.
//
// It owns the local replica of every open map, the log of operations that the
// server has not acknowledged, and one connection: a WebSocket session or a
// POST /sync poll, as the scheme of Config.URL says.
//
// It promises:
//
//   - Reads and writes never wait for the network. A write is merged into the
//     local map and put into the log; a goroutine of the client sends it.
//   - An operation leaves the log only when the server acknowledged it on the
//     connection it was sent on, or refused it; a refusal is reported to
//     Config.OnReject and the server's record is fetched again.
//   - After a reconnect all pending operations are sent once and every open map
//     is compared with the server's Merkle tree, so that replicas become equal
//     whatever was lost in between (PROTOCOL 8 and 24).
//   - Close returns when every goroutine of the client has ended.
//
// It does not keep anything on disk: a process that ends takes its pending
// operations with it. It holds LWW-maps only.
package client
