// Package fanout tells gateways what changed: it receives the events that the
// shards broadcast, and passes each to the gateways whose sessions look at the map.
// It keeps the results of live queries up to date, and carries topics.
//
// It owns the interest (which stream watches which map, topic and query, and one bus
// subscription for each map and topic that anybody watches), the proof that nothing
// is missing (the sequence of every map, shard and lane), one evaluator for each
// distinct query of a map, and one bounded queue for each stream.
//
// It promises, from the return of Watch on, that every logged change of a watched
// map is delivered in the order of its shard, or that a Gap comes in its place: for
// a lost message within two heartbeats and a half, for a lost broker connection as
// soon as it is back (FAN-01). A Gap stands for everything logged before the gateway
// reads it; the gateway heals by reading from the partitions afterwards. Gaps may
// come where nothing was lost: a service that cannot tell says Gap.
//
// Of a live query it promises a QueryResult and then its changes in order, so that
// what the gateway has of it is, as soon as nothing moves, what the query makes of
// the map; no row goes back to an older state on the way. It heals by itself.
// Messages of topics come in the order of their publisher, at most once.
//
// It keeps no records but those of results and no history, and knows no clients: who
// may see an event or ask a query is the gateway's to decide.
package fanout
