// Package query is the query engine of PROTOCOL 12 and 13: what a client asks of
// the values of a map, evaluated on msgpack bytes. Live queries, one-shot queries
// and HTTP use it alike.
//
// Parse reads a query and bounds what it may cost. Match filters, Compare orders,
// Project chooses fields. Top makes the result of one scan, Groups the grouped one,
// Live keeps a result up to date while rows change. The package holds no map, reads
// no clock and does no I/O.
//
// Where the original client and servers differ from one another, the recommendation
// of PROTOCOL 13 decides. README.md of core has the table of operators.
//
// Values are msgpack that msgval.Check has accepted. Scalars are equal by value, so
// 1 is 1.0 and 2^60 is 2^60 as a float; within arrays and maps that holds up to
// ±2^53.
package query

import (
	"github.com/topgun-sync/topgun/core/msgval"
)

// The names of errors.
const (
	BadQuery        = "BAD_QUERY"
	QueryTooComplex = "QUERY_TOO_COMPLEX"
	UnknownOperator = "UNKNOWN_OPERATOR"
	NotSupported    = "NOT_SUPPORTED"
)

// Error is what is wrong with a query. Its text is fixed for each cause and holds
// nothing of the query, so it can be sent to clients as it is.
type Error struct {
	Name string // one of the names above
	Text string // for people: what was wrong and what would be right
}

// Error returns "NAME: text".
func (e *Error) Error() string { return e.Name + ": " + e.Text }

func badQuery(text string) *Error        { return &Error{Name: BadQuery, Text: text} }
func tooComplex(text string) *Error      { return &Error{Name: QueryTooComplex, Text: text} }
func unknownOperator(text string) *Error { return &Error{Name: UnknownOperator, Text: text} }

// Query is a query ready to be evaluated. It does not change and may be used
// concurrently.
type Query struct {
	where        *node // nil: everything
	predicate    *node // nil: everything
	usesKey      bool
	sort         []sortField
	limit        int
	offset       int
	cursor       string
	fields       []attribute
	groupBy      []attribute
	aggregations []aggregation
	measured     []attribute // the fields that are aggregated, each once

	canonical []byte
	identity  []byte // the canonical form of what a cursor is bound to
}

// Canonical returns bytes that are equal for equal queries: all of it counts,
// where, predicate, sort, limit, offset, cursor, fields and groups. The caller must
// not change them.
func (q *Query) Canonical() []byte { return q.canonical }

// Encode returns a msgpack Q that Parse reads back to the same query. The caller
// must not change it.
func (q *Query) Encode() []byte { return q.canonical }

// Match reports whether a row fulfils where and predicate. The cursor is not looked
// at. A value that is no map has no fields; one that JavaScript takes for false
// (nil, false, 0, NaN, "") fulfils no predicate, as for the client.
func (q *Query) Match(key string, value []byte) bool {
	var k []byte
	if q.usesKey {
		k = msgval.AppendString(nil, key)
	}
	if q.where != nil && !q.where.eval(k, value) {
		return false
	}
	return q.predicate == nil || !falsy(value) && q.predicate.eval(k, value)
}

// Limit is how many rows, or groups, the query asks for; 0 means all.
func (q *Query) Limit() int { return q.limit }

// Offset is how many rows, or groups, before those are to be left out. It is 0 for
// a query with a cursor, which says itself where the page begins.
func (q *Query) Offset() int { return q.offset }

// Grouped reports whether the result is groups and not rows.
func (q *Query) Grouped() bool { return len(q.groupBy) > 0 || len(q.aggregations) > 0 }

// Project appends to dst a map of the fields that the query chooses and the value
// has, each under the name that it was chosen by, and returns that. If the query
// chooses none, or the value is no map, it returns value itself and leaves dst
// alone.
func (q *Query) Project(dst, value []byte) []byte {
	if len(q.fields) == 0 || kindOf(value) != msgval.MapKind {
		return value
	}
	var few [16][]byte
	found, n := few[:0], 0
	for i := range q.fields {
		v := q.fields[i].get(nil, value)
		if v != nil {
			n++
		}
		found = append(found, v)
	}
	dst = msgval.AppendMapHeader(dst, n)
	for i, v := range found {
		if v != nil {
			dst = msgval.AppendString(dst, q.fields[i].name)
			dst = append(dst, v...)
		}
	}
	return dst
}

// Equality is a term that every matching row fulfils.
type Equality struct {
	Field string
	Value []byte // as EqualityValue returns it
}

// Equalities returns terms that every matching row fulfils, for an index. There may
// be none, and they never make Match needless.
func (q *Query) Equalities() []Equality {
	var list []Equality
	for _, n := range []*node{q.where, q.predicate} {
		if n != nil {
			list = n.equalities(list)
		}
	}
	return list
}

// EqualityValue returns what an index finds a value under by the field of an
// Equality: it is the same for all values that are equal there. It returns false if
// the value has no such field or nothing is equal to it. The bytes may alias value.
func EqualityValue(value []byte, field string) (canonical []byte, ok bool) {
	a := newAttribute(field)
	v := a.get(nil, value)
	if v == nil {
		return nil, false
	}
	return indexForm(v)
}

// Row is a key with its value, or a group with its aggregates. Whatever takes rows
// keeps their bytes without copying them; nobody may change them afterwards.
type Row struct {
	Key   string
	Value []byte
}
