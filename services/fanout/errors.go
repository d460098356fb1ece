package fanout

import "errors"

var (
	errNotRunning     = errors.New("the service is not running")
	errTooManyStreams = errors.New("too many streams are open")
	errTooManyMaps    = errors.New("the stream watches too many maps")
	errTooManyTopics  = errors.New("the stream watches too many topics")
	errTooManyQueries = errors.New("the stream has too many queries that cannot be answered")
	errNoStream       = errors.New("there is no such stream; subscribe first")
	errSlow           = errors.New("the stream was read too slowly; subscribe again")
	errBus            = errors.New("the bus is not connected")
	errBigMessage     = errors.New("the message is larger than the bus carries")
)

// Errors of a query, as PROTOCOL 12.2 has them: NAME: text. Those of package query
// have the same form.
const (
	noPartitions   = "QUERY_UNAVAILABLE: live queries are not served here"
	tooManyQueries = "QUERY_TOO_MANY: there are too many live queries; end some and ask again"
	tooLarge       = "QUERY_TOO_LARGE: the rows take too much memory; ask for fewer by a limit, a narrower filter or pages"
	tooManyRows    = "QUERY_TOO_LARGE: the groups are made of too many rows; use a narrower filter"
	slowQuery      = "QUERY_TOO_SLOW: the query takes too long on this map; use a simpler or a narrower filter"
	refusedBelow   = "BAD_QUERY: the partitions do not accept the query"
)
