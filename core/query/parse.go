package query

import (
	"math"
	"slices"

	"github.com/topgun-sync/topgun/core/msgval"
)

// What a query may have at most, beside its predicate.
const (
	maxBytes        = 256 << 10
	maxSort         = 8
	maxFields       = 64
	maxGroupBy      = 4
	maxAggregations = 16
	maxRows         = 1 << 30 // a limit or an offset beyond means that
)

// What is wrong with a query.
var (
	errQuery        = badQuery("a query must be one msgpack map")
	errCursor       = badQuery("cursor must be a string")
	errSort         = badQuery(`sort must be an array of {field, direction} or a map from fields to directions, which are "asc" and "desc"`)
	errNumber       = badQuery("limit and offset must be numbers")
	errFields       = badQuery("fields must be an array of field names")
	errGroupBy      = badQuery("groupBy must be an array of field names")
	errAggregations = badQuery("aggregations must be an array of {func, field} with count, sum, min, max or avg; only count goes without a field")

	errBytes            = tooComplex("a query must have at most 256 KiB")
	errSortMany         = tooComplex("sort must have at most 8 fields")
	errFieldsMany       = tooComplex("fields must have at most 64 names")
	errGroupByMany      = tooComplex("groupBy must have at most 4 fields")
	errAggregationsMany = tooComplex("aggregations must have at most 16 elements")
)

// aggregation is one aggregate of a group.
type aggregation struct {
	fn       string
	attr     attribute
	name     string // of the field in the row of the group
	measured int    // where attr is in Query.measured
}

// Parse reads a query: the msgpack map Q of PROTOCOL 12.1, or nothing for all
// records. fields, unless empty, are chosen in place of those within q. sort may
// have either spelling; a limit or offset that is no positive integer is none, as
// for the client. Names that it does not know are left alone. It keeps nothing of
// q. Every error is an *Error.
func Parse(q []byte, fields []string) (*Query, error) {
	query, err := parse(q, fields)
	if err != nil {
		return nil, err
	}
	return query, nil
}

func parse(b []byte, fields []string) (*Query, *Error) {
	q := new(Query)
	if len(b) == 0 {
		b = []byte{0x80}
	}
	if len(b) > maxBytes {
		return nil, errBytes
	}
	rest, err := msgval.Check(b)
	if err != nil || len(rest) > 0 {
		return nil, errQuery
	}
	if kind := kindOf(b); kind != msgval.MapKind && kind != msgval.NilKind {
		return nil, errQuery
	}
	if err := q.parseConditions(field(b, "where"), field(b, "predicate")); err != nil {
		return nil, err
	}
	if err := q.parseWindow(b); err != nil {
		return nil, err
	}
	if err := q.parseFields(field(b, "fields"), fields); err != nil {
		return nil, err
	}
	if err := q.parseGroups(field(b, "groupBy"), field(b, "aggregations")); err != nil {
		return nil, err
	}
	q.identity = q.encode(false)
	q.canonical = q.encode(true)
	if len(q.canonical) > maxBytes {
		return nil, errBytes // what Encode returns can be parsed
	}
	return q, nil
}

func (q *Query) parseConditions(where, predicate []byte) (err *Error) {
	var p predicateParser
	if q.where, err = p.where(where); err != nil {
		return err
	}
	if !isNull(predicate) {
		n, err := p.node(predicate, 1)
		if err != nil {
			return err
		}
		q.predicate = &n
	}
	q.usesKey = q.where != nil && q.where.usesKey() || q.predicate != nil && q.predicate.usesKey()
	return nil
}

func (q *Query) parseWindow(b []byte) (err *Error) {
	if q.sort, err = parseSort(field(b, "sort")); err != nil {
		return err
	}
	if q.limit, err = parseCount(field(b, "limit")); err != nil {
		return err
	}
	if q.offset, err = parseCount(field(b, "offset")); err != nil {
		return err
	}
	if c := field(b, "cursor"); !isNull(c) {
		s, ok := text(c)
		if !ok {
			return errCursor
		}
		q.cursor = string(s)
	}
	if q.cursor != "" {
		q.offset = 0
	}
	return nil
}

// parseCount reads a limit or an offset.
func parseCount(b []byte) (int, *Error) {
	h, _ := msgval.ReadHead(b)
	switch h.Kind {
	case msgval.NilKind, msgval.IntKind:
		return 0, nil
	case msgval.UintKind:
		return int(min(h.Num, maxRows)), nil
	case msgval.FloatKind:
		f := math.Float64frombits(h.Num)
		if f != math.Trunc(f) || !(f > 0) {
			return 0, nil
		}
		return int(min(f, maxRows)), nil
	}
	return 0, errNumber
}

func parseSort(b []byte) (sort []sortField, _ *Error) {
	h, _ := msgval.ReadHead(b)
	if h.N > maxSort && h.Kind.Container() {
		return nil, errSortMany
	}
	add := func(name, direction []byte) bool {
		field, ok := text(name)
		dir, isText := text(direction)
		if !ok || !isText && !isNull(direction) || isText && string(dir) != "asc" && string(dir) != "desc" {
			return false
		}
		sort = append(sort, sortField{attr: newAttribute(string(field)), desc: string(dir) == "desc"})
		return true
	}
	switch h.Kind {
	case msgval.NilKind:
	case msgval.ArrayKind:
		for e := range elements(b) {
			if !add(field(e, "field"), field(e, "direction")) {
				return nil, errSort
			}
		}
	case msgval.MapKind:
		for name, direction := range pairs(b) {
			if !add(name, direction) {
				return nil, errSort
			}
		}
	default:
		return nil, errSort
	}
	return sort, nil
}

func (q *Query) parseFields(b []byte, instead []string) (err *Error) {
	var names []string
	if len(instead) > 0 {
		if len(instead) > maxFields {
			return errFieldsMany
		}
		names = instead
	} else if names, err = parseNames(b, maxFields, errFields, errFieldsMany); err != nil {
		return err
	}
	for _, name := range names {
		q.fields = addName(q.fields, name)
	}
	return nil
}

// parseNames reads an array of names.
func parseNames(b []byte, most uint64, bad, many *Error) (names []string, _ *Error) {
	h, _ := msgval.ReadHead(b)
	switch {
	case h.Kind == msgval.NilKind:
		return nil, nil
	case h.Kind != msgval.ArrayKind:
		return nil, bad
	case h.N > most:
		return nil, many
	}
	for e := range elements(b) {
		s, ok := text(e)
		if !ok {
			return nil, bad
		}
		names = append(names, string(s))
	}
	return names, nil
}

// addName appends an attribute unless it is there.
func addName(list []attribute, name string) []attribute {
	for i := range list {
		if list[i].name == name {
			return list
		}
	}
	return append(list, newAttribute(name))
}

func (q *Query) parseGroups(groupBy, aggregations []byte) *Error {
	names, err := parseNames(groupBy, maxGroupBy, errGroupBy, errGroupByMany)
	if err != nil {
		return err
	}
	for _, name := range names {
		q.groupBy = addName(q.groupBy, name)
	}
	h, _ := msgval.ReadHead(aggregations)
	switch {
	case h.Kind == msgval.NilKind:
		return nil
	case h.Kind != msgval.ArrayKind:
		return errAggregations
	case h.N > maxAggregations:
		return errAggregationsMany
	}
	for e := range elements(aggregations) {
		if err := q.parseAggregation(e); err != nil {
			return err
		}
	}
	return nil
}

func (q *Query) parseAggregation(b []byte) *Error {
	fn, _ := text(field(b, "func"))
	name := field(b, "field")
	s, ok := text(name)
	if !ok && !isNull(name) {
		return errAggregations
	}
	switch string(fn) {
	case "count":
	case "sum", "min", "max", "avg":
		if !ok {
			return errAggregations
		}
	default:
		return errAggregations
	}
	a := aggregation{fn: string(fn), attr: newAttribute(string(s)), name: "__" + string(fn) + "_" + string(s)}
	for i := range q.aggregations {
		if q.aggregations[i].name == a.name {
			return nil
		}
	}
	if a.fn != "count" {
		q.measured = addName(q.measured, a.attr.name)
		a.measured = slices.IndexFunc(q.measured, func(m attribute) bool { return m.name == a.attr.name })
	}
	q.aggregations = append(q.aggregations, a)
	return nil
}

// encode returns the canonical form of the query, or of what a cursor is bound to:
// what makes its rows and their order.
func (q *Query) encode(whole bool) []byte {
	var dst []byte
	n := 0
	name := func(s string) {
		n++
		dst = msgval.AppendString(dst, s)
	}
	if q.where != nil {
		name("where")
		dst = q.encodeWhere(dst)
	}
	if q.predicate != nil {
		name("predicate")
		dst = q.predicate.encode(dst)
	}
	if len(q.sort) > 0 {
		name("sort")
		dst = q.encodeSort(dst)
	}
	if len(q.groupBy) > 0 {
		name("groupBy")
		dst = encodeNames(dst, q.groupBy)
	}
	if len(q.aggregations) > 0 {
		name("aggregations")
		dst = q.encodeAggregations(dst)
	}
	if whole && len(q.fields) > 0 {
		name("fields")
		dst = encodeNames(dst, q.fields)
	}
	if whole && q.limit > 0 {
		name("limit")
		dst = msgval.AppendUint(dst, uint64(q.limit))
	}
	if whole && q.offset > 0 {
		name("offset")
		dst = msgval.AppendUint(dst, uint64(q.offset))
	}
	if whole && q.cursor != "" {
		name("cursor")
		dst = msgval.AppendString(dst, q.cursor)
	}
	return msgval.Canonical(nil, append(msgval.AppendMapHeader(nil, n), dst...))
}

// encodeWhere writes the clause back from its terms. Terms of one field stand side
// by side.
func (q *Query) encodeWhere(dst []byte) []byte {
	terms := q.where.children
	var fields int
	var body []byte
	for len(terms) > 0 {
		n := 1
		for n < len(terms) && terms[n].attr.name == terms[0].attr.name {
			n++
		}
		fields++
		body = msgval.AppendString(body, terms[0].attr.name)
		if terms[0].op == opEq {
			body = append(body, terms[0].value.raw...)
		} else {
			body = msgval.AppendMapHeader(body, n)
			for i := range terms[:n] {
				body = msgval.AppendString(body, whereName(terms[i].op))
				body = append(body, terms[i].value.raw...)
			}
		}
		terms = terms[n:]
	}
	return append(msgval.AppendMapHeader(dst, fields), body...)
}

// whereName is the name of an operator in a where clause.
func whereName(op opcode) string {
	if op == opNeq {
		return "$ne"
	}
	return "$" + opNames[op]
}

func (q *Query) encodeSort(dst []byte) []byte {
	dst = msgval.AppendArrayHeader(dst, len(q.sort))
	for i := range q.sort {
		direction := "asc"
		if q.sort[i].desc {
			direction = "desc"
		}
		dst = msgval.AppendMapHeader(dst, 2)
		dst = msgval.AppendString(dst, "field")
		dst = msgval.AppendString(dst, q.sort[i].attr.name)
		dst = msgval.AppendString(dst, "direction")
		dst = msgval.AppendString(dst, direction)
	}
	return dst
}

func (q *Query) encodeAggregations(dst []byte) []byte {
	dst = msgval.AppendArrayHeader(dst, len(q.aggregations))
	for i := range q.aggregations {
		dst = msgval.AppendMapHeader(dst, 2)
		dst = msgval.AppendString(dst, "func")
		dst = msgval.AppendString(dst, q.aggregations[i].fn)
		dst = msgval.AppendString(dst, "field")
		dst = msgval.AppendString(dst, q.aggregations[i].attr.name)
	}
	return dst
}

func encodeNames(dst []byte, names []attribute) []byte {
	dst = msgval.AppendArrayHeader(dst, len(names))
	for i := range names {
		dst = msgval.AppendString(dst, names[i].name)
	}
	return dst
}
