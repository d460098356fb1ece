// Package gateway is the edge of the suite: the only room that clients talk to.
//
// It owns the WebSocket sessions, POST /sync, the health of the client port, and
// GatewayService for operators. It keeps no data. A session is lost with its
// connection, and its client connects again, here or to another gateway, and compares
// Merkle roots (PROTOCOL 8): that is why everything here may be dropped at any time
// except an ack that was sent.
//
// It promises:
//
//   - An OP_ACK says what the owners' receipts said, never more (ACK-01, ACK-03). Acks
//     of a session leave in the order of its batches and never cover an op that was not
//     answered (ACK-05). A rejected op is covered and gets OP_REJECTED.
//   - A session whose map is watched sees every change from then on, or a fresh root in
//     its place, whatever is lost between the owners and its socket (SYN-03, FAN-01).
//   - A live query's session gets its result and then every change of it, in order, or a
//     fresh result in their place.
//   - Every queue of a session is bounded. Who reads too slowly loses its place and not
//     the gateway's memory: live events become a root, and who reads nothing is closed
//     with 4490 (FAN-02). PONG, errors and acks go ahead of bulk data.
//   - Bad input ends, at worst, its own connection (RELIABILITY 4). Nothing is allocated
//     on the word of a client beyond 64 KiB, and no text of a client is repeated in an
//     answer or a log line.
//   - A client whose copy of a map is older than deletions are remembered gives it up
//     before it is told anything else of it (TMB-01).
//   - A principal comes from a verified token only, and ends with it (SEC-02, SEC-04).
//   - A request of the protocol that is not served is refused at once, in the form its
//     caller waits for.
//
// It does not merge, order or keep records, which is the partition's work, and it does
// not decide who won: it carries the winner back.
//
// # How the files hang together
//
//	ws.go        upgrade, caps, the open sessions, the sweeper, drain
//	reader.go    bytes of a socket → messages
//	session.go   one session: state machine, authentication, dispatch
//	ops.go       OP_BATCH → router.Apply → OP_ACK
//	sync.go      SYNC_INIT, MERKLE_REQ_BUCKET; trees.go holds what they compare,
//	             interest.go what a session looks at; orsync.go is what OR-maps add
//	devices.go   how far the copies of devices are, resets, GC_PRUNE
//	counters.go  counters; locks.go locks; partitionmap.go the map of clients' cluster mode
//	queries.go   live queries, shared by the sessions that have them; probe.go: their maps
//	topics.go    topics; journal.go the event journal
//	concern.go   how long acks wait for the store
//	refuse.go    what is not served
//	writer.go    a session's outbound queue and its writing goroutine
//	hub.go       which session looks at which map; stream.go is the fanout stream,
//	             deliver.go makes frames of what it brings
//	route.go     ops and reads → the owners of the shards
//	httpsync.go  POST /sync, on the same router; httpdelta.go what changed in its maps
//	service.go   Config, Deps, New, Run, Ready, the client port
//
// A lock is held for moments and never across a call to another room. The order is
// hub.mu, queries.mu, topics.mu or keeper.mu, then session.mu; sockets.mu, forest.mu and
// devices.mu are taken alone.
package gateway
