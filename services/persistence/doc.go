// Package persistence is the service that keeps the data in a database: it
// drains the write-behind log into a Store, reads the Store back for partitions that
// start, and shows the log as the journal of changes.
//
// It owns the Store seam, the stored rows, and the watermarks that say how far
// each lane of the log is stored. It promises that
//   - nothing leaves the log before the transaction that holds it has committed
//     (RELIABILITY PG-01, LOG-03);
//   - the rows and the watermarks move in one transaction, so that rows plus the
//     replay of the log above the watermarks equal the live state (PG-03, PG-05,
//     LOG-06);
//   - storing the same commits again changes nothing, and two processes draining
//     one log never both commit (PG-02, PG-07);
//   - what is forgotten goes and nothing younger than that, in the same transaction;
//   - the journal shows what the log holds in its order, each change once;
//   - a Store that is away stops nothing but itself: the log is the queue, and a
//     Load then fails instead of showing an empty map (PG-04, PG-08).
//
// It does not decide who wins: the shards did, before they wrote the log. It
// looks into no value but to show it as JSON to people, and it never skips what
// it does not understand: it stops and raises an alarm (LOG-07).
package persistence
