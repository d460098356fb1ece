package wire

import (
	"slices"
	"strconv"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/msgval"
)

// JournalRead is JOURNAL_READ, from a client: PROTOCOL 16.1.
type JournalRead struct {
	RequestID    string
	FromSequence uint64 // the first wanted; 0: the oldest that is kept
	Limit        uint64 // 0: not said
	MapName      string // empty: every map
	// Err says why the request must be refused. RequestID is known.
	Err *Error
}

// JournalSubscribe is JOURNAL_SUBSCRIBE, from a client: PROTOCOL 16.1.
type JournalSubscribe struct {
	RequestID string // also the id of the subscription
	// FromSequence is where to replay from, if HasFrom.
	FromSequence uint64
	HasFrom      bool
	MapName      string   // empty: every map
	Types        []string // of PUT, UPDATE and DELETE; nil: all
	// Err says why the request must be refused. RequestID is known.
	Err *Error
}

// JournalUnsubscribe is JOURNAL_UNSUBSCRIBE, from a client.
type JournalUnsubscribe struct {
	SubscriptionID string // the RequestID of the JournalSubscribe
}

// JournalEntry is one event of the journal: the J of PROTOCOL 16.1.
type JournalEntry struct {
	Sequence  uint64 // a decimal string on the wire, below 2^63
	Type      string // PUT, UPDATE or DELETE
	MapName   string
	Key       string
	Value     []byte // one msgpack value; empty: left out
	Timestamp hlc.Timestamp
	NodeID    string
	// Tag is the tag of an OR record, which travels in metadata. Empty: left out.
	Tag string
}

// JournalReadResponse is JOURNAL_READ_RESPONSE, from a server.
type JournalReadResponse struct {
	RequestID string
	Events    []JournalEntry
	HasMore   bool
	// Error says why there are no events. The protocol has no such field; empty: left
	// out.
	Error string
}

// JournalEvent is JOURNAL_EVENT, from a server.
type JournalEvent struct {
	Event JournalEntry
}

// Type implements Message.
func (m *JournalRead) Type() string { return "JOURNAL_READ" }

// AppendTo implements Message.
func (m *JournalRead) AppendTo(dst []byte) []byte {
	dst = appendFlat(dst, m.Type(), pairs(3, m.Limit != 0, m.MapName != ""))
	dst = appendText(dst, "requestId", m.RequestID)
	dst = appendSequence(dst, "fromSequence", m.FromSequence)
	if m.Limit != 0 {
		dst = appendNumber(dst, "limit", m.Limit)
	}
	if m.MapName != "" {
		dst = appendText(dst, "mapName", m.MapName)
	}
	return dst
}

// Type implements Message.
func (m *JournalSubscribe) Type() string { return "JOURNAL_SUBSCRIBE" }

// AppendTo implements Message.
func (m *JournalSubscribe) AppendTo(dst []byte) []byte {
	dst = appendFlat(dst, m.Type(), pairs(2, m.HasFrom, m.MapName != "", m.Types != nil))
	dst = appendText(dst, "requestId", m.RequestID)
	if m.HasFrom {
		dst = appendSequence(dst, "fromSequence", m.FromSequence)
	}
	if m.MapName != "" {
		dst = appendText(dst, "mapName", m.MapName)
	}
	if m.Types != nil {
		dst = appendTexts(dst, "types", m.Types)
	}
	return dst
}

// Type implements Message.
func (m *JournalUnsubscribe) Type() string { return "JOURNAL_UNSUBSCRIBE" }

// AppendTo implements Message.
func (m *JournalUnsubscribe) AppendTo(dst []byte) []byte {
	return appendText(appendFlat(dst, m.Type(), 2), "subscriptionId", m.SubscriptionID)
}

// Type implements Message.
func (m *JournalReadResponse) Type() string { return "JOURNAL_READ_RESPONSE" }

// AppendTo implements Message.
func (m *JournalReadResponse) AppendTo(dst []byte) []byte {
	dst = appendFlat(dst, m.Type(), pairs(4, m.Error != ""))
	dst = appendText(dst, "requestId", m.RequestID)
	dst = appendArray(dst, "events", len(m.Events))
	for i := range m.Events {
		dst = m.Events[i].appendTo(dst)
	}
	dst = appendFlag(dst, "hasMore", m.HasMore)
	if m.Error != "" {
		dst = appendText(dst, "error", m.Error)
	}
	return dst
}

// Type implements Message.
func (m *JournalEvent) Type() string { return "JOURNAL_EVENT" }

// AppendTo implements Message.
func (m *JournalEvent) AppendTo(dst []byte) []byte {
	dst = msgval.AppendString(appendFlat(dst, m.Type(), 2), "event")
	return m.Event.appendTo(dst)
}

func (e *JournalEntry) appendTo(dst []byte) []byte {
	dst = msgval.AppendMapHeader(dst, pairs(6, len(e.Value) != 0, e.Tag != ""))
	dst = appendSequence(dst, "sequence", e.Sequence)
	dst = appendText(dst, "type", e.Type)
	dst = appendText(dst, "mapName", e.MapName)
	dst = appendText(dst, "key", e.Key)
	if len(e.Value) != 0 {
		dst = appendRaw(dst, "value", e.Value)
	}
	dst = appendStamp(dst, "timestamp", e.Timestamp)
	dst = appendText(dst, "nodeId", e.NodeID)
	if e.Tag != "" {
		dst = appendText(appendMap(dst, "metadata", 1), "tag", e.Tag)
	}
	return dst
}

// appendSequence appends a number as decimal text, which JavaScript reads as a
// BigInt.
func appendSequence(dst []byte, key string, n uint64) []byte {
	var buf [20]byte
	digits := strconv.AppendUint(buf[:0], n, 10)
	dst = append(msgval.AppendString(dst, key), 0xa0|byte(len(digits))) // a short string
	return append(dst, digits...)
}

// sequence reads a sequence, as text or as an integer, or nil, which is 0.
func (d *decoder) sequence(field string, into *uint64) *Error {
	*into = 0
	if h, _ := msgval.ReadHead(d.rest()); h.Kind != msgval.StrKind {
		if err := d.count(field, into); err != nil {
			return badSequence(field)
		}
		return nil
	}
	s, _ := d.str()
	n, err := strconv.ParseUint(alias(s), 10, 63)
	if err != nil {
		return badSequence(field)
	}
	*into = n
	return nil
}

func badSequence(field string) *Error {
	return badMessage(field + " must be decimal text of an integer from 0 to 2^63-1")
}

func (d *decoder) journalRead() (Message, *Error) {
	m := new(JournalRead)
	var fromErr, limitErr, mapErr *Error
	err := d.fields("a frame", func(key []byte) *Error {
		switch string(key) {
		case "requestId":
			return d.text("requestId", maxID, &m.RequestID)
		case "fromSequence":
			fromErr = d.sequence("fromSequence", &m.FromSequence)
		case "limit":
			limitErr = d.count("limit", &m.Limit)
		case "mapName":
			mapErr = d.optionalMapName(&m.MapName)
		default:
			d.skip()
		}
		return nil
	})
	switch {
	case err != nil:
	case !validID(m.RequestID):
		err = badMessage("requestId must be a string of " + idRule)
	case fromErr != nil:
		m.Err = fromErr
	case limitErr != nil:
		m.Err = limitErr
	default:
		m.Err = mapErr
	}
	return m, err
}

// optionalMapName reads the name of a map, or nil, which is none.
func (d *decoder) optionalMapName(into *string) *Error {
	*into = ""
	if d.isNil() {
		return nil
	}
	s, ok := d.str()
	if !ok {
		return badMessage("mapName must be a string")
	}
	if err := CheckMapName(alias(s)); err != nil {
		return err
	}
	*into = string(s)
	return nil
}

func (d *decoder) journalSubscribe() (Message, *Error) {
	m := new(JournalSubscribe)
	var fromErr, mapErr, typesErr *Error
	err := d.fields("a frame", func(key []byte) *Error {
		switch string(key) {
		case "requestId":
			return d.text("requestId", maxID, &m.RequestID)
		case "fromSequence":
			m.HasFrom = !d.atNil()
			fromErr = d.sequence("fromSequence", &m.FromSequence)
		case "mapName":
			mapErr = d.optionalMapName(&m.MapName)
		case "types":
			m.Types, typesErr = d.journalTypes()
		default:
			d.skip()
		}
		return nil
	})
	switch {
	case err != nil:
	case !validID(m.RequestID):
		err = badMessage("requestId must be a string of " + idRule)
	case fromErr != nil:
		m.Err = fromErr
	case mapErr != nil:
		m.Err = mapErr
	default:
		m.Err = typesErr
	}
	return m, err
}

// journalTypes reads an array of types of events, or nil, which is none. What is
// named twice counts once, which bounds the list.
func (d *decoder) journalTypes() ([]string, *Error) {
	if d.isNil() {
		return nil, nil
	}
	n, isArray := d.arrayHeader()
	types := make([]string, 0, 3)
	known := isArray
	for range n {
		s, _ := d.str()
		name := journalType(s)
		known = known && name != ""
		if name != "" && !slices.Contains(types, name) {
			types = append(types, name)
		}
	}
	if !known {
		return nil, badMessage("types must be an array of PUT, UPDATE and DELETE")
	}
	return types, nil
}

// journalType returns the type of event with a name on the wire, or none.
func journalType(name []byte) string {
	for _, t := range [...]string{"PUT", "UPDATE", "DELETE"} {
		if string(name) == t {
			return t
		}
	}
	return ""
}

func (d *decoder) journalUnsubscribe() (Message, *Error) {
	m := new(JournalUnsubscribe)
	err := d.fields("a frame", func(key []byte) *Error {
		if string(key) == "subscriptionId" {
			return d.text("subscriptionId", maxID, &m.SubscriptionID)
		}
		d.skip()
		return nil
	})
	if err == nil && !validID(m.SubscriptionID) {
		err = badMessage("subscriptionId must be a string of " + idRule)
	}
	return m, err
}

func (d *decoder) journalReadResponse() (Message, *Error) {
	m := new(JournalReadResponse)
	err := d.fields("a frame", func(key []byte) (err *Error) {
		switch string(key) {
		case "requestId":
			return d.serverText("requestId", &m.RequestID)
		case "events":
			m.Events, err = array(d, "events", d.journalEntry)
			return err
		case "hasMore":
			return d.flag("hasMore", &m.HasMore)
		case "error":
			return d.serverText("error", &m.Error)
		}
		d.skip()
		return nil
	})
	return m, err
}

func (d *decoder) journalEvent() (Message, *Error) {
	m := new(JournalEvent)
	has := false
	err := d.fields("a frame", func(key []byte) *Error {
		if string(key) == "event" {
			has, m.Event = true, JournalEntry{}
			return d.journalEntry(&m.Event)
		}
		d.skip()
		return nil
	})
	if err == nil && !has {
		err = badMessage("event is missing; want a map")
	}
	return m, err
}

func (d *decoder) journalEntry(e *JournalEntry) *Error {
	stamped := false
	err := d.fields("an event", func(key []byte) (err *Error) {
		switch string(key) {
		case "sequence":
			return d.sequence("sequence", &e.Sequence)
		case "type":
			s, _ := d.str()
			e.Type = journalType(s)
			return nil
		case "mapName":
			return d.readMapName(&e.MapName)
		case "key":
			return d.serverText("key", &e.Key)
		case "value":
			e.Value = d.raw() // nil is a value of OR records
			return nil
		case "timestamp":
			stamped = true
			e.Timestamp, err = d.stamp()
			return err
		case "nodeId":
			return d.serverText("nodeId", &e.NodeID)
		case "metadata":
			return d.journalMetadata(e)
		}
		d.skip()
		return nil
	})
	switch {
	case err != nil:
		return err
	case e.Type == "":
		return badMessage("the type of an event must be PUT, UPDATE or DELETE")
	case !stamped:
		return noStamp()
	}
	return nil
}

// journalMetadata reads what is known of metadata, which is anything.
func (d *decoder) journalMetadata(e *JournalEntry) *Error {
	e.Tag = ""
	if h, _ := msgval.ReadHead(d.rest()); h.Kind != msgval.MapKind {
		d.skip()
		return nil
	}
	return d.fields("metadata", func(key []byte) *Error {
		if string(key) == "tag" {
			return d.serverText("tag", &e.Tag)
		}
		d.skip()
		return nil
	})
}
