// Package commitlog is the write-behind log: one JetStream stream, in which every
// partition process writes a lane of its own, and a key-value bucket that names the
// lane of each shard.
//
// It owns the form of both in NATS: subjects, headers, stream settings, keys. It
// promises that
//   - only the process that a lane belongs to appends to it, and only until it is
//     sealed (RELIABILITY LOG-01): every append carries the sequence that the lane's
//     subject must end at, so whoever lost the lane is refused by the log itself,
//     whatever it believes;
//   - an append whose answer was lost is looked up before anything else is done, and
//     ends as exactly one commit (LOG-08);
//   - the stream drops nothing by itself: it refuses when it is full, keeps without
//     an age limit, and cannot be deleted from (LOG-02); Trim never takes the last
//     commit of a lane, since an empty subject would accept anybody (LOG-03);
//   - what a reader cannot understand stops it and is never skipped (LOG-07);
//   - a reader that ends, however it does, leaves nothing on the server; one whose
//     process died, or that could not reach it, is forgotten after a minute;
//   - ownership is read from the leader and changed by compare-and-set (OWN-05).
//
// It does not know what a commit means beyond lane, number and clock ceiling, it
// keeps no state about shards, and it does not decide who should own one.
//
// What a caller of several methods has to know:
//   - A stream that is full refuses seals and claims like every other append.
//     Taking over waits until the log has been drained and trimmed.
//   - Watermarks are positions of one lane in one History: sequence in the stream
//     and number within the lane. Numbers rise by one, which is how a reader proves
//     that it missed nothing; sequences have holes where other lanes wrote, or
//     where Trim was.
//   - The log may be trimmed as soon as it is stored. Whoever wants to read its past
//     keeps more of it, and learns from Expired what need not be kept.
//   - The sync policy of the server cannot be asked for by a client (LOG-05): whoever
//     starts the server is answerable for it.
package commitlog
