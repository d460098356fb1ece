package query

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"math"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/topgun-sync/topgun/core/msgval"
)

// MaxGroups bounds the groups of a query.
const MaxGroups = 10_000

// What adding to groups runs into.
var (
	// ErrTooManyGroups means that the rows make more than MaxGroups groups.
	ErrTooManyGroups = errors.New("the query makes more than 10,000 groups")
	// ErrPartial means that a row is no partial state of a group of this query.
	ErrPartial = errors.New("not the partial state of a group of this query")
)

// maxGroupKey is how long the key of a group may be before it is hashed.
const maxGroupKey = 256

// group is the rows that have equal fields.
type group struct {
	key    string
	values [][]byte // the fields, as indexForm returns them
	count  uint64
	aggs   []aggregate // one per field of Query.measured
}

// groupOf returns the key of the group that a row belongs to, and the fields of
// that group. The key is the text of the fields, with commas between: a string that
// could be nothing else is itself, all else is JSON. Where there is none or a long
// one, it is # and a SHA-256.
func (q *Query) groupOf(dst []byte, key string, value []byte) (groupKey []byte, values [][]byte) {
	var k []byte
	start, plain := len(dst), true
	for i := range q.groupBy {
		a := &q.groupBy[i]
		if a.key {
			k = msgval.AppendString(nil, key)
		}
		v := []byte{0xc0} // a missing field is like nil
		if found := a.get(k, value); found != nil {
			v = groupForm(found)
		}
		values = append(values, v)
		if i > 0 {
			dst = append(dst, ',')
		}
		var ok bool
		if word, isWord := wordOf(v); isWord {
			dst, ok = append(dst, word...), true
		} else {
			dst, ok = msgval.AppendJSON(dst, v)
		}
		if !ok || len(dst)-start > maxGroupKey {
			plain = false
			dst = dst[:start]
		}
	}
	if plain {
		return dst, values
	}
	h := sha256.New()
	for _, v := range values {
		h.Write(v)
	}
	return hex.AppendEncode(append(dst[:start], '#'), h.Sum(nil)), values
}

// wordOf returns a string that is no JSON and holds nothing that separates or quotes:
// it begins with a letter.
func wordOf(v []byte) (word []byte, ok bool) {
	word, ok = text(v)
	if !ok || !utf8.Valid(word) || bytes.ContainsAny(word, "\",") {
		return nil, false
	}
	first, _ := utf8.DecodeRune(word)
	switch string(word) {
	case "true", "false", "null":
		return nil, false
	}
	return word, unicode.IsLetter(first)
}

// groupForm is the form of a field that all rows of a group share.
func groupForm(v []byte) []byte {
	if form, ok := indexForm(v); ok {
		return form
	}
	return msgval.AppendFloat(nil, math.NaN())
}

func (q *Query) newGroup(key string, values [][]byte) *group {
	g := &group{key: key, aggs: make([]aggregate, len(q.measured))}
	for _, v := range values {
		g.values = append(g.values, slices.Clone(v)) // not to hold a whole record
	}
	return g
}

// add counts a row in.
func (g *group) add(q *Query, value []byte) {
	g.count++
	for i := range q.measured {
		g.aggs[i].add(q.measured[i].get(nil, value))
	}
}

// row returns the row that the client gets (PROTOCOL 12.4).
func (g *group) row(q *Query) Row {
	n := 2 + len(g.values)
	for i := range q.aggregations {
		if q.aggregations[i].fn != "count" {
			n++
		}
	}
	v := msgval.AppendMapHeader(nil, n)
	for i := range g.values {
		v = msgval.AppendString(v, q.groupBy[i].name)
		v = append(v, g.values[i]...)
	}
	v = msgval.AppendString(v, "__key")
	v = msgval.AppendString(v, g.key)
	v = msgval.AppendString(v, "__count")
	v = msgval.AppendUint(v, g.count)
	for i := range q.aggregations {
		if a := &q.aggregations[i]; a.fn != "count" {
			v = msgval.AppendString(v, a.name)
			v = g.aggs[a.measured].append(v, a.fn)
		}
	}
	return Row{Key: g.key, Value: v}
}

// Groups is the grouped result of a query (PROTOCOL 12.4). It is not for concurrent
// use.
type Groups struct {
	q       *Query
	byKey   map[string]*group
	scratch []byte
}

// NewGroups makes a result without groups. A query with aggregations and without
// groupBy has one group of all rows, with an empty key; none if there are no rows.
func NewGroups(q *Query) *Groups { return &Groups{q: q, byKey: make(map[string]*group)} }

// Add takes a row that Match has accepted. Its error is ErrTooManyGroups; the row
// is then left out.
func (s *Groups) Add(key string, value []byte) error {
	var values [][]byte
	s.scratch, values = s.q.groupOf(s.scratch[:0], key, value)
	g := s.byKey[string(s.scratch)]
	if g == nil {
		if len(s.byKey) == MaxGroups {
			return ErrTooManyGroups
		}
		g = s.q.newGroup(string(s.scratch), values)
		s.byKey[g.key] = g
	}
	g.add(s.q, value)
	return nil
}

// Partials returns one row per group, sorted by key: the key of the group and a
// state for Merge.
func (s *Groups) Partials() []Row {
	rows := make([]Row, 0, len(s.byKey))
	for _, g := range s.byKey {
		v := msgval.AppendArrayHeader(nil, 3)
		v = msgval.AppendArrayHeader(v, len(g.values))
		for _, field := range g.values {
			v = append(v, field...)
		}
		v = msgval.AppendUint(v, g.count)
		v = msgval.AppendArrayHeader(v, len(g.aggs))
		for i := range g.aggs {
			v = g.aggs[i].encode(v)
		}
		rows = append(rows, Row{Key: g.key, Value: v})
	}
	slices.SortFunc(rows, func(a, b Row) int { return strings.Compare(a.Key, b.Key) })
	return rows
}

// Merge takes a row of the Partials of the same query over other rows. Its errors
// are ErrTooManyGroups and ErrPartial; the groups are then as they were.
func (s *Groups) Merge(r Row) error {
	other, ok := s.decodePartial(r)
	if !ok {
		return ErrPartial
	}
	g := s.byKey[r.Key]
	if g == nil {
		if len(s.byKey) == MaxGroups {
			return ErrTooManyGroups
		}
		s.byKey[r.Key] = other
		return nil
	}
	g.count += other.count
	for i := range g.aggs {
		g.aggs[i].merge(&other.aggs[i])
	}
	return nil
}

func (s *Groups) decodePartial(r Row) (*group, bool) {
	if rest, err := msgval.Check(r.Value); err != nil || len(rest) > 0 {
		return nil, false
	}
	parts := slices.Collect(elements(r.Value))
	if len(parts) != 3 {
		return nil, false
	}
	g := &group{key: r.Key, values: slices.Collect(elements(parts[0]))}
	count, _ := msgval.ReadHead(parts[1])
	g.count = count.Num
	for e := range elements(parts[2]) {
		a, ok := decodeAggregate(e)
		if !ok {
			return nil, false
		}
		g.aggs = append(g.aggs, a)
	}
	return g, count.Kind == msgval.UintKind && len(g.values) == len(s.q.groupBy) && len(g.aggs) == len(s.q.measured)
}

// Rows returns the groups that come after a position, empty for all, in the order
// of the query, its offset and limit applied, and whether others follow.
func (s *Groups) Rows(after []byte) (rows []Row, more bool) {
	all := make([]ordered, 0, len(s.byKey))
	for _, g := range s.byKey {
		r := g.row(s.q)
		if s.q.After(after, r) {
			all = append(all, ordered{order: s.q.Position(r), row: r})
		}
	}
	slices.SortFunc(all, byOrder)
	all = all[min(s.q.offset, len(all)):]
	if s.q.limit > 0 && len(all) > s.q.limit {
		all, more = all[:s.q.limit], true
	}
	for i := range all {
		rows = append(rows, all[i].row)
	}
	return rows, more
}
