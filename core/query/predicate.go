package query

import (
	"bytes"
	"regexp"
	"slices"

	"github.com/topgun-sync/topgun/core/msgval"
)

// What a predicate may have at most.
const (
	maxTerms   = 256  // nodes, fields of where, and elements of containsAll and containsAny
	maxDepth   = 32   // nodes within nodes
	maxList    = 1000 // elements of in
	maxPattern = 1024 // bytes of a pattern of like and regex
	few        = 8    // elements of a list that are compared one by one
)

// What is wrong with a predicate or a where.
var (
	errWhere      = badQuery("where must be a map from field names to values")
	errWhereOp    = unknownOperator("where knows the operators $gt, $gte, $lt, $lte and $ne; use a predicate for others")
	errWhereMixed = badQuery("a value in where has either operators such as $gt or fields, not both")
	errNode       = badQuery("a predicate must be a map with the string op, and with attribute and value or with children")
	errAttribute  = badQuery("the attribute of a predicate must be a string")
	errChildren   = badQuery("the children of a predicate must be an array of predicates")
	errOperator   = unknownOperator("want eq, neq, gt, gte, lt, lte, in, between, like, regex, contains, containsAll, " +
		"containsAny, startsWith, endsWith, isNull, isNotNull, and, or, not")
	errMatch = &Error{Name: NotSupported, Text: "full text is not indexed: match, matchPhrase and matchPrefix cannot be " +
		"answered; use contains or like"}
	errRegexp = badQuery("a regular expression is not one of RE2 (https://github.com/google/re2/wiki/Syntax), which " +
		"has no look-around and no back-references")

	errRegexpSize = tooComplex("the regular expressions of a query must have at most 1,000 instructions together")
	errTerms      = tooComplex("a query must have at most 256 terms")
	errDepth      = tooComplex("predicates must be nested at most 32 deep")
	errList       = tooComplex("the list of in must have at most 1,000 elements")
	errPattern    = tooComplex("a pattern must have at most 1,024 bytes")
)

// opcode is what a node does.
type opcode uint8

const (
	opEq opcode = iota
	opNeq
	opGt
	opGte
	opLt
	opLte
	opIn
	opBetween
	opLike
	opRegex
	opContains
	opContainsAll
	opContainsAny
	opStartsWith
	opEndsWith
	opIsNull
	opIsNotNull
	opAnd
	opOr
	opNot
)

// opNames are the names of the operators by their codes.
var opNames = [...]string{
	opEq: "eq", opNeq: "neq", opGt: "gt", opGte: "gte", opLt: "lt", opLte: "lte", opIn: "in", opBetween: "between",
	opLike: "like", opRegex: "regex", opContains: "contains", opContainsAll: "containsAll", opContainsAny: "containsAny",
	opStartsWith: "startsWith", opEndsWith: "endsWith", opIsNull: "isNull", opIsNotNull: "isNotNull",
	opAnd: "and", opOr: "or", opNot: "not",
}

// whereOperators are those of a where clause (PROTOCOL 21).
var whereOperators = map[string]opcode{"$gt": opGt, "$gte": opGte, "$lt": opLt, "$lte": opLte, "$ne": opNeq}

// node is one node of a predicate.
type node struct {
	op       opcode
	never    bool // nothing can fulfil it: no attribute, or an operand of the wrong type
	attr     attribute
	value    operand
	list     []operand           // in, between, containsAll, containsAny
	set      map[string]struct{} // of a list of many: what indexForm makes of it
	setNaN   bool                // the list has NaN, which is not in the set
	lower    [][]byte            // contains…: the texts in lower case, nil for what is no text
	re       *regexp.Regexp
	like     []uint32
	children []node
}

// eval reports whether a row fulfils the node. key is the msgpack string of the
// key.
func (n *node) eval(key, value []byte) bool {
	if n.never {
		return false
	}
	switch n.op {
	case opAnd:
		for i := range n.children {
			if !n.children[i].eval(key, value) {
				return false
			}
		}
		return true
	case opOr:
		for i := range n.children {
			if n.children[i].eval(key, value) {
				return true
			}
		}
		return false
	case opNot:
		return len(n.children) == 0 || !n.children[0].eval(key, value)
	}
	v := n.attr.get(key, value)
	switch n.op {
	case opEq:
		return n.value.equal(v)
	case opNeq:
		return !n.value.equal(v)
	case opIsNull:
		return isNull(v)
	case opIsNotNull:
		return !isNull(v)
	}
	return v != nil && n.evalPresent(v)
}

func isNull(v []byte) bool { return v == nil || kindOf(v) == msgval.NilKind }

// evalPresent evaluates the operators that nothing missing can fulfil.
func (n *node) evalPresent(v []byte) bool {
	switch n.op {
	case opGt:
		c, ok := n.value.compare(v)
		return ok && c > 0
	case opGte:
		c, ok := n.value.compare(v)
		return ok && c >= 0
	case opLt:
		c, ok := n.value.compare(v)
		return ok && c < 0
	case opLte:
		c, ok := n.value.compare(v)
		return ok && c <= 0
	case opBetween:
		low, okLow := n.list[0].compare(v)
		high, okHigh := n.list[1].compare(v)
		return okLow && okHigh && low >= 0 && high <= 0
	case opIn:
		return n.in(v)
	case opContains, opContainsAll, opContainsAny:
		return n.contains(v)
	}
	s, ok := text(v)
	if !ok {
		return false
	}
	switch n.op {
	case opLike:
		return like(n.like, s)
	case opRegex:
		return n.re.Match(s)
	case opStartsWith:
		return bytes.HasPrefix(s, n.value.str)
	case opEndsWith:
		return bytes.HasSuffix(s, n.value.str)
	}
	return false
}

func (n *node) in(v []byte) bool {
	if n.set != nil {
		form, ok := indexForm(v)
		_, found := n.set[string(form)]
		return ok && found
	}
	for i := range n.list {
		if n.list[i].equal(v) {
			return true
		}
	}
	return false
}

// contains looks for texts within a text, without regard to case, and for elements
// of an array.
func (n *node) contains(v []byte) bool {
	var holds func(i int) bool
	switch kindOf(v) {
	case msgval.StrKind:
		s, _ := text(v)
		var buf [256]byte
		s = appendLower(buf[:0], s)
		holds = func(i int) bool { return n.lower[i] != nil && bytes.Contains(s, n.lower[i]) }
	case msgval.ArrayKind:
		if n.set != nil {
			return n.containsMany(v)
		}
		holds = func(i int) bool {
			for e := range elements(v) {
				if n.list[i].equal(e) {
					return true
				}
			}
			return false
		}
	default:
		return false
	}
	for i := range n.list {
		if holds(i) == (n.op == opContainsAny) {
			return n.op == opContainsAny
		}
	}
	return n.op != opContainsAny
}

// containsMany is contains for an array and a list of many: it looks at each element
// of the array once.
func (n *node) containsMany(v []byte) bool {
	found := make(map[string]struct{})
	for e := range elements(v) {
		form, _ := indexForm(e)
		if _, ok := n.set[string(form)]; !ok {
			continue
		}
		if n.op == opContainsAny {
			return true
		}
		found[string(form)] = struct{}{}
	}
	return n.op == opContainsAll && len(found) == len(n.set) && !n.setNaN
}

// equalities appends the equalities that every row must fulfil to fulfil the node.
func (n *node) equalities(dst []Equality) []Equality {
	switch {
	case n.never:
	case n.op == opAnd:
		for i := range n.children {
			dst = n.children[i].equalities(dst)
		}
	case n.op == opEq && !n.attr.key && n.value.raw != nil:
		if form, ok := indexForm(n.value.raw); ok {
			dst = append(dst, Equality{Field: n.attr.name, Value: form})
		}
	}
	return dst
}

// usesKey reports whether the node looks at the key of a row.
func (n *node) usesKey() bool {
	for i := range n.children {
		if n.children[i].usesKey() {
			return true
		}
	}
	return n.attr.key
}

// encode appends the node as it is in a query.
func (n *node) encode(dst []byte) []byte {
	if n.op >= opAnd {
		dst = msgval.AppendMapHeader(dst, 2)
		dst = msgval.AppendString(dst, "op")
		dst = msgval.AppendString(dst, opNames[n.op])
		dst = msgval.AppendString(dst, "children")
		dst = msgval.AppendArrayHeader(dst, len(n.children))
		for i := range n.children {
			dst = n.children[i].encode(dst)
		}
		return dst
	}
	pairs := 2
	if n.value.raw != nil {
		pairs = 3
	}
	dst = msgval.AppendMapHeader(dst, pairs)
	dst = msgval.AppendString(dst, "op")
	dst = msgval.AppendString(dst, opNames[n.op])
	dst = msgval.AppendString(dst, "attribute")
	dst = msgval.AppendString(dst, n.attr.name)
	if n.value.raw != nil {
		dst = msgval.AppendString(dst, "value")
		dst = append(dst, n.value.raw...)
	}
	return dst
}

// predicateParser reads predicates within the bounds of one query.
type predicateParser struct {
	terms  int // so far
	regexp int // instructions so far
}

func (p *predicateParser) count(terms int) *Error {
	if p.terms += terms; p.terms > maxTerms {
		return errTerms
	}
	return nil
}

// where reads a where clause, a conjunction of equalities and of maps of
// whereOperators.
func (p *predicateParser) where(b []byte) (*node, *Error) {
	h, _ := msgval.ReadHead(b)
	switch {
	case h.Kind == msgval.NilKind || h.Kind == msgval.MapKind && h.N == 0:
		return nil, nil
	case h.Kind != msgval.MapKind:
		return nil, errWhere
	case h.N > maxTerms:
		return nil, errTerms
	}
	and := &node{op: opAnd}
	last := make(map[string][]byte, h.N) // of equal names the last wins
	for key, value := range pairs(b) {
		name, ok := text(key)
		if !ok {
			return nil, errWhere
		}
		last[string(name)] = value
	}
	for key := range pairs(b) {
		name, _ := text(key)
		value, ok := last[string(name)]
		if !ok {
			continue
		}
		delete(last, string(name))
		terms, err := p.whereField(string(name), value)
		if err != nil {
			return nil, err
		}
		and.children = append(and.children, terms...)
	}
	return and, nil
}

// whereField reads one field of a where clause.
func (p *predicateParser) whereField(name string, value []byte) ([]node, *Error) {
	attr := newAttribute(name)
	var terms []node
	fields := 0
	if kindOf(value) == msgval.MapKind {
		for key, operand := range pairs(value) {
			op, _ := text(key)
			if !bytes.HasPrefix(op, []byte("$")) {
				fields++
				continue
			}
			code, ok := whereOperators[string(op)]
			if !ok {
				return nil, errWhereOp
			}
			term := node{op: code, attr: attr, value: newOperand(operand)}
			if i := slices.IndexFunc(terms, func(n node) bool { return n.op == code }); i >= 0 {
				terms[i] = term // of equal names the last wins
				continue
			}
			if err := p.count(1); err != nil {
				return nil, err
			}
			terms = append(terms, term)
		}
	}
	switch {
	case terms == nil:
		return []node{{op: opEq, attr: attr, value: newOperand(value)}}, p.count(1)
	case fields > 0:
		return nil, errWhereMixed
	}
	return terms, nil
}

// node reads a node. Operands of the wrong type make a node that nothing fulfils,
// as for the client: it sends what the application has not set yet.
func (p *predicateParser) node(b []byte, depth int) (n node, _ *Error) {
	if depth > maxDepth {
		return n, errDepth
	}
	if err := p.count(1); err != nil {
		return n, err
	}
	if kindOf(b) != msgval.MapKind {
		return n, errNode
	}
	op, ok := text(field(b, "op"))
	if !ok {
		return n, errNode
	}
	switch code := slices.Index(opNames[:], string(op)); {
	case code >= 0:
		n.op = opcode(code)
	case slices.Contains([]string{"match", "matchPhrase", "matchPrefix"}, string(op)):
		return n, errMatch
	default:
		return n, errOperator
	}
	if n.op >= opAnd {
		return n, p.children(&n, field(b, "children"), depth)
	}
	attr := field(b, "attribute")
	name, ok := text(attr)
	if !ok && !isNull(attr) {
		return n, errAttribute
	}
	n.attr = newAttribute(string(name))
	n.never = len(name) == 0
	return n, p.operand(&n, field(b, "value"))
}

func (p *predicateParser) children(n *node, b []byte, depth int) *Error {
	h, _ := msgval.ReadHead(b)
	switch {
	case h.Kind == msgval.NilKind:
		return nil
	case h.Kind != msgval.ArrayKind:
		return errChildren
	case h.N > maxTerms:
		return errTerms
	}
	for e := range elements(b) {
		child, err := p.node(e, depth+1)
		if err != nil {
			return err
		}
		n.children = append(n.children, child)
	}
	return nil
}

// operand reads the value of a node, nil if it has none.
func (p *predicateParser) operand(n *node, b []byte) *Error {
	h, _ := msgval.ReadHead(b)
	if n.op == opIn && h.Kind == msgval.ArrayKind && h.N > maxList {
		return errList
	}
	if (n.op == opLike || n.op == opRegex) && h.Kind == msgval.StrKind && h.N > maxPattern {
		return errPattern
	}
	n.value = newOperand(b)
	isText, isList := h.Kind == msgval.StrKind && b != nil, h.Kind == msgval.ArrayKind
	switch n.op {
	case opIn, opBetween, opContainsAll, opContainsAny:
		if n.op == opContainsAll || n.op == opContainsAny {
			if err := p.count(int(min(h.N, maxTerms+1))); isList && err != nil {
				return err
			}
		}
		for e := range elements(b) {
			n.list = append(n.list, newOperand(e))
		}
		n.never = n.never || !isList || n.op == opBetween && h.N != 2
	case opContains:
		n.list = []operand{n.value}
		n.never = n.never || b == nil
	case opLike, opStartsWith, opEndsWith, opRegex:
		n.never = n.never || !isText
	}
	return p.prepare(n, isText)
}

// prepare makes what eval needs of an operand.
func (p *predicateParser) prepare(n *node, isText bool) *Error {
	if len(n.list) > few {
		n.set = make(map[string]struct{}, len(n.list))
		for i := range n.list {
			form, ok := indexForm(n.list[i].raw)
			if n.setNaN = n.setNaN || !ok; ok {
				n.set[string(form)] = struct{}{}
			}
		}
	}
	switch n.op {
	case opContains, opContainsAll, opContainsAny:
		n.lower = make([][]byte, len(n.list))
		for i := range n.list {
			if n.list[i].kind == msgval.StrKind {
				n.lower[i] = appendLower([]byte{}, n.list[i].str)
			}
		}
	case opLike:
		if isText {
			n.like = compileLike(n.value.str)
		}
	case opRegex:
		if !isText {
			return nil
		}
		re, size, err := compileRegexp(string(n.value.str), maxRegexp-p.regexp)
		if err != nil {
			return err
		}
		n.re, p.regexp = re, p.regexp+size
	}
	return nil
}
