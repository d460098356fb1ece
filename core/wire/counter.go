package wire

import (
	"cmp"
	"slices"

	"github.com/topgun-sync/topgun/core/msgval"
)

// CounterNode is what one node has counted: PROTOCOL 14.2. Both sides are at most
// 2^53, up to which JavaScript holds every integer.
type CounterNode struct {
	NodeID             string
	Positive, Negative uint64
}

// CounterState is the state of a PN-counter. Decoded, its nodes are ordered by
// NodeID, and nodes that counted nothing are left out.
type CounterState struct {
	Nodes []CounterNode
}

// CounterRequest is COUNTER_REQUEST, from a client: PROTOCOL 14.2.
type CounterRequest struct {
	Name string
}

// CounterSync is COUNTER_SYNC, from a client. It is encoded as the TypeScript
// client spells it, with positive and negative.
type CounterSync struct {
	Name  string
	State CounterState
}

// CounterResponse is COUNTER_RESPONSE, from a server. It is encoded in both
// spellings: positive and negative, p and n.
type CounterResponse struct {
	Name  string
	State CounterState
}

// CounterUpdate is COUNTER_UPDATE, from a server, encoded as CounterResponse is.
type CounterUpdate struct {
	Name  string
	State CounterState
}

// Type implements Message.
func (m *CounterRequest) Type() string { return "COUNTER_REQUEST" }

// AppendTo implements Message.
func (m *CounterRequest) AppendTo(dst []byte) []byte {
	return appendText(appendWrapped(dst, m.Type(), 1), "name", m.Name)
}

// Type implements Message.
func (m *CounterSync) Type() string { return "COUNTER_SYNC" }

// AppendTo implements Message.
func (m *CounterSync) AppendTo(dst []byte) []byte {
	dst = appendText(appendWrapped(dst, m.Type(), 2), "name", m.Name)
	dst = appendMap(dst, "state", 2)
	dst = m.State.appendSide(dst, "positive", positive)
	return m.State.appendSide(dst, "negative", negative)
}

// Type implements Message.
func (m *CounterResponse) Type() string { return "COUNTER_RESPONSE" }

// AppendTo implements Message.
func (m *CounterResponse) AppendTo(dst []byte) []byte {
	return appendCounter(dst, m.Type(), m.Name, m.State)
}

// Type implements Message.
func (m *CounterUpdate) Type() string { return "COUNTER_UPDATE" }

// AppendTo implements Message.
func (m *CounterUpdate) AppendTo(dst []byte) []byte {
	return appendCounter(dst, m.Type(), m.Name, m.State)
}

// appendCounter appends a frame with a state in both spellings.
func appendCounter(dst []byte, typ, name string, s CounterState) []byte {
	dst = appendText(appendWrapped(dst, typ, 2), "name", name)
	dst = appendMap(dst, "state", 4)
	dst = s.appendSide(dst, "positive", positive)
	dst = s.appendSide(dst, "negative", negative)
	dst = s.appendSide(dst, "p", positive)
	return s.appendSide(dst, "n", negative)
}

// counterSide is one of the two sides of a counter.
type counterSide bool

const (
	positive counterSide = true
	negative counterSide = false
)

func (side counterSide) of(n *CounterNode) uint64 {
	if side == positive {
		return n.Positive
	}
	return n.Negative
}

func (side counterSide) node(id string, count uint64) CounterNode {
	if side == positive {
		return CounterNode{NodeID: id, Positive: count}
	}
	return CounterNode{NodeID: id, Negative: count}
}

// appendSide appends one side of a state: the nodes that counted on it.
func (s CounterState) appendSide(dst []byte, key string, side counterSide) []byte {
	count := 0
	for i := range s.Nodes {
		if side.of(&s.Nodes[i]) != 0 {
			count++
		}
	}
	dst = appendMap(dst, key, count)
	for i := range s.Nodes {
		if n := side.of(&s.Nodes[i]); n != 0 {
			dst = appendNumber(dst, s.Nodes[i].NodeID, n)
		}
	}
	return dst
}

func (d *decoder) counterRequest() (Message, *Error) {
	m := new(CounterRequest)
	err := d.fields("payload", func(key []byte) *Error {
		if string(key) == "name" {
			return d.resourceName("name", &m.Name)
		}
		d.skip()
		return nil
	})
	if err == nil {
		err = CheckResourceName(m.Name)
	}
	return m, err
}

func (d *decoder) counterSync() (Message, *Error) {
	m := new(CounterSync)
	return m, d.counter(&m.Name, &m.State)
}

// counter reads a payload that is the name and the state of a counter.
func (d *decoder) counter(name *string, state *CounterState) *Error {
	stated := false
	err := d.fields("payload", func(key []byte) (err *Error) {
		switch string(key) {
		case "name":
			return d.resourceName("name", name)
		case "state":
			stated = true
			state.Nodes, err = d.counterState()
			return err
		}
		d.skip()
		return nil
	})
	switch {
	case err != nil:
		return err
	case !stated:
		return badMessage("state is missing; want a map of positive and negative")
	}
	return CheckResourceName(*name)
}

// counterState reads a state in either spelling or both. What is said twice of a
// side of a node counts once, and the larger counts.
func (d *decoder) counterState() ([]CounterNode, *Error) {
	var nodes []CounterNode
	err := d.fields("state", func(key []byte) (err *Error) {
		switch string(key) {
		case "positive", "p":
			nodes, err = d.counterSide(nodes, positive)
		case "negative", "n":
			nodes, err = d.counterSide(nodes, negative)
		default:
			d.skip()
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(nodes, func(a, b CounterNode) int { return cmp.Compare(a.NodeID, b.NodeID) })
	merged := nodes[:0]
	for _, n := range nodes {
		if last := len(merged) - 1; last >= 0 && merged[last].NodeID == n.NodeID {
			m := &merged[last]
			m.Positive, m.Negative = max(m.Positive, n.Positive), max(m.Negative, n.Negative)
			continue
		}
		merged = append(merged, n)
	}
	if len(merged) > d.lim.MaxCounterNodes {
		return nil, tooManyNodes()
	}
	return slices.Clip(merged), nil
}

func tooManyNodes() *Error {
	return &Error{Name: ValueTooLarge, Code: 413, Text: "the state of a counter has too many nodes; it is enough to send your own"}
}

// counterSide reads one side of a state, a map from node to count, or nil, which
// is none.
func (d *decoder) counterSide(nodes []CounterNode, side counterSide) ([]CounterNode, *Error) {
	if d.isNil() {
		return nodes, nil
	}
	if h, _ := msgval.ReadHead(d.rest()); h.Kind == msgval.MapKind && h.N > uint64(d.lim.MaxCounterNodes) {
		return nil, tooManyNodes()
	}
	err := d.fields("positive or negative", func(id []byte) *Error {
		if !validID(alias(id)) {
			return badMessage("the node of a counter must be a string of " + idRule)
		}
		if reserved(alias(id)) {
			return reservedName("the node of a counter has a name that is reserved")
		}
		count, ok := d.integer()
		if !ok {
			return badMessage("positive and negative must map nodes to integers from 0 to 2^53")
		}
		if count != 0 {
			nodes = append(nodes, side.node(string(id), count))
		}
		return nil
	})
	return nodes, err
}
