// Package line is the JSON form of a record in topgunctl's output, and of the lines
// that export writes and import reads. Field names are stable: scripts and files
// depend on them.
package line

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/topgun-sync/topgun/core/msgval"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// Stamp decides who wins.
type Stamp struct {
	Millis  uint64 `json:"millis"`
	Counter uint64 `json:"counter"`
	NodeID  string `json:"nodeId"`
}

// String is the stamp as PROTOCOL 4.1 writes it.
func (s Stamp) String() string { return fmt.Sprintf("%d:%d:%s", s.Millis, s.Counter, s.NodeID) }

// Arrival is when the shard took a record in.
type Arrival struct {
	Millis  uint64 `json:"millis"`
	Counter uint64 `json:"counter"`
}

// Record is the content of a record: exactly one of Value, Msgpack and Deleted.
type Record struct {
	Map  string `json:"map"`
	Kind string `json:"kind"` // "lww" or "or"
	Key  string `json:"key"`
	Tag  string `json:"tag,omitempty"` // of an OR-map
	// Value is the value as JSON, where that tells it completely.
	Value json.RawMessage `json:"value,omitempty"`
	// Msgpack is the value otherwise: byte strings, extensions, NaN and the like.
	Msgpack []byte `json:"msgpack,omitempty"`
	// Deleted says that the record is a tombstone.
	Deleted   bool   `json:"deleted,omitempty"`
	Stamp     Stamp  `json:"stamp"`
	TTLMillis uint64 `json:"ttlMillis,omitempty"`
}

// KindOf is the word for a kind.
func KindOf(k typesv1.Kind) string {
	if k == typesv1.Kind_KIND_UNSPECIFIED {
		k = typesv1.Kind_KIND_LWW
	}
	return strings.ToLower(strings.TrimPrefix(k.String(), "KIND_"))
}

// StampOf converts a stamp.
func StampOf(t *typesv1.Timestamp) Stamp {
	return Stamp{t.GetMillis(), t.GetCounter(), t.GetNodeId()}
}

// Proto converts it back.
func (s Stamp) Proto() *typesv1.Timestamp {
	return &typesv1.Timestamp{Millis: s.Millis, Counter: s.Counter, NodeId: s.NodeID}
}

// ArrivalOf converts an arrival.
func ArrivalOf(a *typesv1.Arrival) Arrival { return Arrival{a.GetMillis(), a.GetCounter()} }

// Of is the record of a change.
func Of(c *typesv1.Change) Record {
	r := Record{
		Map: c.GetMap(), Kind: KindOf(c.GetKind()), Key: string(c.GetKey()), Tag: c.GetTag(),
		Stamp: StampOf(c.GetRecord().GetTimestamp()), TTLMillis: c.GetRecord().GetTtlMillis(),
	}
	r.setValue(c.GetRecord().GetValue())
	return r
}

// setValue uses JSON only if reading it back gives an equal value.
func (r *Record) setValue(value []byte) {
	r.Deleted = len(value) == 0
	if r.Deleted {
		return
	}
	if text, ok := msgval.AppendJSON(nil, value); ok {
		if back, err := msgval.FromJSON(text); err == nil && msgval.Equal(back, value) {
			r.Value = text
			return
		}
	}
	r.Msgpack = value
}

// Text is the value for people.
func (r Record) Text() string {
	switch {
	case r.Deleted:
		return "(deleted)"
	case r.Value != nil:
		return string(r.Value)
	}
	return fmt.Sprintf("msgpack %x", r.Msgpack)
}

// Append appends v as one line of JSON.
func Append(dst *bytes.Buffer, v any) error {
	encoder := json.NewEncoder(dst)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(v)
}

// Parse reads one line. Its errors say what is wrong and what would be right.
func Parse(text []byte) (*partitionv1.Op, error) {
	var r Record
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&r); err != nil {
		return nil, fmt.Errorf("want one JSON object as export writes it: %w", err)
	}
	if decoder.More() {
		return nil, errors.New("want one JSON object on a line")
	}
	return r.Op()
}

// Op is the op that merges the record. What it does not check the server does.
func (r Record) Op() (*partitionv1.Op, error) {
	op := &partitionv1.Op{Map: r.Map, Key: []byte(r.Key), Tag: r.Tag, Record: &typesv1.Record{
		Timestamp: r.Stamp.Proto(), TtlMillis: r.TTLMillis,
	}}
	switch r.Kind {
	case "lww": // kind 0
	case "or":
		op.Kind = typesv1.Kind_KIND_OR
	default:
		return nil, errors.New(`kind must be "lww" or "or"`)
	}
	given := 0
	for _, is := range []bool{r.Value != nil, len(r.Msgpack) > 0, r.Deleted} {
		if is {
			given++
		}
	}
	switch {
	case given != 1:
		return nil, errors.New(`exactly one of value, msgpack and "deleted":true must be given`)
	case r.Value != nil:
		value, err := msgval.FromJSON(r.Value)
		if err != nil {
			return nil, fmt.Errorf("value: %w", err)
		}
		op.Record.Value = value
	default:
		op.Record.Value = r.Msgpack
	}
	return op, nil
}
