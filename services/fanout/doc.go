// Package fanout tells gateways what changed: it receives the events that the
// shards broadcast, and passes each to the gateways whose sessions look at the map.
//
// It owns the interest (which stream watches which map, and one bus subscription
// for each map that anybody watches), the proof that nothing is missing (the
// sequence of every map, shard and lane), and one bounded queue for each stream.
//
// It promises, from the return of Watch on, that every logged change of a watched
// map is delivered in the order of its shard, or that a Gap comes in its place: for
// a lost message within two heartbeats and a half, for a lost broker connection as
// soon as it is back (FAN-01). A Gap stands for everything logged before the gateway
// reads it; the gateway heals by reading from the partitions afterwards. Gaps may
// come where nothing was lost: a service that cannot tell says Gap.
//
// It does not look into values, keeps no records and no history, and knows no
// clients: who may see an event is the gateway's to decide.
package fanout
