package fanout

import "github.com/topgun-sync/topgun/core/query"

// index finds the evaluators whose query a row may match, by one equality term of
// each query: with 100,000 queries `owner = X`, a row costs one lookup. It is not
// for concurrent use.
type index struct {
	fields map[string]map[string]*bucket
	// rest are the evaluators without such a term: every row may match them.
	rest bucket
}

type bucket struct{ members []*evaluator }

// place is where an index holds an evaluator. The zero place is nowhere.
type place struct {
	bucket *bucket
	slot   int
	// field and value name the bucket; both are empty for the rest.
	field, value string
}

// indexed says whether rows find the evaluator by a term.
func (p place) indexed() bool { return p.field != "" || p.value != "" }

// add puts an evaluator below that of its terms which has the fewest: so a term that
// all queries share, such as status = "open", does not collect them.
func (x *index) add(e *evaluator) place {
	p := place{bucket: &x.rest}
	for _, term := range e.query.Equalities() {
		b := x.fields[term.Field][string(term.Value)]
		if b == nil {
			b = &bucket{}
		}
		if !p.indexed() || len(b.members) < len(p.bucket.members) {
			p = place{bucket: b, field: term.Field, value: string(term.Value)}
		}
	}
	if p.indexed() && len(p.bucket.members) == 0 {
		if x.fields == nil {
			x.fields = make(map[string]map[string]*bucket)
		}
		if x.fields[p.field] == nil {
			x.fields[p.field] = make(map[string]*bucket)
		}
		x.fields[p.field][p.value] = p.bucket
	}
	p.slot = len(p.bucket.members)
	p.bucket.members = append(p.bucket.members, e)
	return p
}

// remove takes out the evaluator at its place.
func (x *index) remove(p place) {
	b := p.bucket
	last := len(b.members) - 1
	b.members[p.slot] = b.members[last]
	b.members[p.slot].place.slot = p.slot
	b.members[last] = nil
	b.members = b.members[:last]
	if last > 0 || !p.indexed() {
		return
	}
	delete(x.fields[p.field], p.value)
	if len(x.fields[p.field]) == 0 {
		delete(x.fields, p.field)
	}
}

// candidates appends the evaluators that a row of this value may match; each occurs
// once. A nil value matches none, but those of the rest may hold the row.
func (x *index) candidates(to []*evaluator, value []byte) []*evaluator {
	if value != nil {
		for field, values := range x.fields {
			canonical, ok := query.EqualityValue(value, field)
			if !ok {
				continue
			}
			if b := values[string(canonical)]; b != nil {
				to = append(to, b.members...)
			}
		}
	}
	return append(to, x.rest.members...)
}
