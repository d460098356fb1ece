// Package partition is the service that owns the maps: it merges ops, logs what
// they changed, and answers every read about the maps.
//
// It owns the records in memory, one goroutine per shard, and the process's lane of
// the log. It promises that
//   - a receipt is given, an event published and a read answered only after every
//     change it speaks of is in the log (RELIABILITY ACK-01, ACK-02);
//   - an op sent again has no further effect (ACK-06), and one that was refused had
//     none (ACK-04);
//   - records do not depend on the order in which ops arrive (CRDT-01), and after a
//     restart they are what they were (LOG-06);
//   - once another process has taken the shards over, nothing of this one is
//     accepted any more; it drops everything and Run returns ErrFenced (OWN-01);
//   - a position handed out to a reader lies below every arrival given later, by
//     whichever owner and whatever the wall clocks do (SYN-01, CLK-01);
//   - a lock has one holder at a time, for as long as it was promised and its session
//     is kept alive, and the tokens of its name rise for ever (PROTOCOL 14.3);
//   - a tombstone that was forgotten does not come back, nor does what it beat
//     (TMB-01).
//
// It does not know clients, permissions or frames, and stores nothing itself. It claims all shards of the cluster.
//
// README.md draws the state machines of a shard and of a lane.
package partition
