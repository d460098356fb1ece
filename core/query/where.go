// Package query evaluates what clients ask of the values of a map. It has the
// where clause of PROTOCOL 12.1, a conjunction of equalities; predicates, sorting
// and aggregation belong here too. It works on msgpack bytes, holds no records
// and does no I/O.
package query

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"strings"

	"github.com/topgun-sync/topgun/core/msgval"
)

// maxTerms bounds the terms of a where clause.
const maxTerms = 64

// What ParseWhere finds wrong.
var (
	// ErrWhere means that the clause cannot be read.
	ErrWhere = errors.New("where must be a map from field names to values, nested at most 128 deep")
	// ErrTooComplex means that the clause has too many terms.
	ErrTooComplex = errors.New("where has more than 64 terms")
	// ErrOperator means that the clause asks for more than equality.
	ErrOperator = errors.New("where knows equality only, no operators such as $gt; use a predicate")
)

// Filter is a where clause ready to be evaluated. It does not change and may be
// used concurrently. A nil *Filter passes everything.
type Filter struct {
	terms []term
}

// term is one equality.
type term struct {
	field []byte // the name as it stands in the clause
	path  [][]byte
	value []byte // canonical
	never bool   // no value is equal to NaN
}

// ParseWhere reads a where clause, a msgpack map. It copies what it keeps. No
// bytes, nil and an empty map make a filter that passes everything.
func ParseWhere(where []byte) (*Filter, error) {
	if len(where) == 0 {
		return nil, nil
	}
	if rest, err := msgval.Check(where); err != nil || len(rest) != 0 {
		return nil, ErrWhere
	}
	h, _ := msgval.ReadHead(where)
	switch {
	case h.Kind == msgval.NilKind:
		return nil, nil
	case h.Kind != msgval.MapKind:
		return nil, ErrWhere
	case h.N > maxTerms:
		return nil, ErrTooComplex
	}
	f := new(Filter)
	for key, value := range pairs(where) {
		name, ok := text(key)
		if !ok {
			return nil, fmt.Errorf("a field name is no string: %w", ErrWhere)
		}
		t := term{field: bytes.Clone(name), value: msgval.Canonical(nil, value)}
		for part := range strings.SplitSeq(string(name), ".") {
			t.path = append(t.path, []byte(part))
		}
		switch h, _ := msgval.ReadHead(t.value); h.Kind {
		case msgval.FloatKind:
			t.never = math.IsNaN(math.Float64frombits(h.Num))
		case msgval.MapKind:
			for key := range pairs(t.value) {
				if op, ok := text(key); ok && bytes.HasPrefix(op, []byte("$")) {
					return nil, ErrOperator
				}
			}
		}
		// Of equal names the last wins.
		replaced := false
		for i := range f.terms {
			if bytes.Equal(f.terms[i].field, t.field) {
				f.terms[i], replaced = t, true
			}
		}
		if !replaced {
			f.terms = append(f.terms, t)
		}
	}
	return f, nil
}

// Match reports whether every term holds for a value that msgval.Check has
// accepted: the field is there and its value is equal to that of the term,
// integers and floats by their number, maps and arrays by their content. A field
// is the one of that very name or, if there is none, what the name leads to as a
// path of names with dots between (PROTOCOL 13.2). A value that is no map passes
// only a filter without terms.
func (f *Filter) Match(value []byte) bool {
	if f == nil {
		return true
	}
	for i := range f.terms {
		if !f.terms[i].match(value) {
			return false
		}
	}
	return true
}

func (t *term) match(value []byte) bool {
	if t.never {
		return false
	}
	v, ok := field(value, t.field)
	if !ok && len(t.path) > 1 {
		v, ok = value, true
		for _, name := range t.path {
			if v, ok = field(v, name); !ok {
				break
			}
		}
	}
	return ok && msgval.Equal(v, t.value)
}

// field returns the value of a field of a map; of equal names the last wins.
func field(value, name []byte) (found []byte, ok bool) {
	for key, v := range pairs(value) {
		if s, isText := text(key); isText && bytes.Equal(s, name) {
			found, ok = v, true
		}
	}
	return found, ok
}

// pairs yields keys and values of a map, and nothing for any other value.
func pairs(value []byte) func(func(key, value []byte) bool) {
	return func(yield func(key, value []byte) bool) {
		h, ok := msgval.ReadHead(value)
		if !ok || h.Kind != msgval.MapKind {
			return
		}
		rest := value[h.Size:]
		for range h.N {
			n := msgval.Skip(rest)
			m := n + msgval.Skip(rest[n:])
			if n == 0 || m == n || !yield(rest[:n], rest[n:m]) {
				return
			}
			rest = rest[m:]
		}
	}
}

// text returns the bytes of a string, and false for any other value.
func text(v []byte) ([]byte, bool) {
	h, ok := msgval.ReadHead(v)
	if !ok || h.Kind != msgval.StrKind {
		return nil, false
	}
	return v[h.Size:], true
}
