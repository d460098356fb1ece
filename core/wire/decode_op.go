package wire

import (
	"bytes"
	"strconv"
	"time"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/msgval"
)

// maxStoredNodeID bounds the node id of any stamp. It leaves room for what servers
// append to the node id of a client.
const maxStoredNodeID = 2 * maxNodeID

// maxTTL bounds ttlMs.
const maxTTL = 10 * 365 * 24 * time.Hour / time.Millisecond

func (d *decoder) opBatch() (Message, *Error) {
	m := new(OpBatch)
	var ops bool
	err := d.fields("payload", func(key []byte) (err *Error) {
		switch string(key) {
		case "ops":
			ops = true
			m.Ops, err = d.ops("ops")
			return err
		case "writeConcern":
			return d.writeConcern(&m.WriteConcern)
		case "timeout":
			return d.count("timeout", &m.TimeoutMillis)
		}
		d.skip()
		return nil
	})
	if err == nil && !ops {
		err = badMessage("ops is missing; want an array")
	}
	return m, err
}

func (d *decoder) clientOp() (Message, *Error) {
	m := &OpBatch{Ops: make([]Op, 1)}
	return m, d.op(&m.Ops[0])
}

// ops reads an array of operations.
func (d *decoder) ops(field string) ([]Op, *Error) {
	n, ok := d.arrayHeader()
	switch {
	case !ok:
		return nil, badMessage(field + " must be an array")
	case n > d.lim.MaxOps:
		return nil, &Error{Name: TooManyOps, Code: 413, Text: "the batch has too many operations; send it in parts"}
	}
	ops := make([]Op, n)
	for i := range ops {
		if err := d.op(&ops[i]); err != nil {
			return nil, err
		}
	}
	return ops, nil
}

// writeConcern reads one of the levels of PROTOCOL 10.7, or nil, which is empty.
func (d *decoder) writeConcern(into *string) *Error {
	*into = ""
	if d.isNil() {
		return nil
	}
	s, _ := d.str()
	for _, level := range [...]string{"FIRE_AND_FORGET", "MEMORY", "APPLIED", "REPLICATED", "PERSISTED"} {
		if string(s) == level {
			*into = level
			return nil
		}
	}
	return badMessage("writeConcern must be FIRE_AND_FORGET, MEMORY, APPLIED, REPLICATED or PERSISTED")
}

// rawOp is an operation as far as its fields can be read one by one.
type rawOp struct {
	mapName, key, kind, tag []byte
	record                  rawRecord // of record or orRecord
	hasRecord, hasORRecord  bool
	timestamp               hlc.Timestamp
	hasTimestamp            bool

	// What is wrong with a field, by field, so that the last of equal keys wins.
	mapErr, keyErr, kindErr, tagErr, recordErr, timestampErr, concernErr *Error
}

// op reads an operation. What is wrong with it alone goes into op.Err, unless it
// is no map or has no readable id: then it cannot be refused by itself and the
// whole batch is bad.
func (d *decoder) op(op *Op) *Error {
	n, ok := d.mapHeader()
	if !ok {
		return badMessage("an operation must be a map")
	}
	var raw rawOp
	idOK := false
	for range n {
		key, ok := d.str()
		if !ok {
			return badMessage("the keys of an operation must be strings")
		}
		switch string(key) {
		case "id":
			idOK = d.id(&op.ID)
		case "mapName":
			raw.mapName, raw.mapErr = d.bytes("mapName")
		case "key":
			raw.key, raw.keyErr = d.bytes("key")
		case "opType":
			raw.kind, raw.kindErr = d.bytes("opType")
		case "record":
			if raw.hasRecord = !d.isNil(); raw.hasRecord {
				raw.recordErr = d.record(&raw.record, clientStamps)
			}
		case "orRecord":
			if raw.hasORRecord = !d.isNil(); raw.hasORRecord {
				raw.recordErr = d.record(&raw.record, orRecord|clientStamps)
			}
		case "orTag":
			raw.tag, raw.tagErr = d.bytes("orTag")
		case "timestamp":
			raw.timestamp, raw.timestampErr = d.clientStamp()
			raw.hasTimestamp = true
		case "writeConcern":
			raw.concernErr = d.writeConcern(&op.WriteConcern)
		default:
			d.skip()
		}
	}
	if !idOK {
		return badMessage("the id of an operation must be a string of " + idRule)
	}
	op.Err = d.finish(op, &raw)
	return nil
}

// bytes reads a string as its bytes, or nil, which is none.
func (d *decoder) bytes(field string) ([]byte, *Error) {
	if d.isNil() {
		return nil, nil
	}
	s, ok := d.str()
	if !ok {
		return nil, badMessage(field + " must be a string")
	}
	return s, nil
}

// finish checks the fields of an operation and puts them in place.
func (d *decoder) finish(op *Op, raw *rawOp) *Error {
	for _, err := range [...]*Error{raw.mapErr, raw.keyErr, raw.kindErr, raw.tagErr, raw.recordErr, raw.timestampErr, raw.concernErr} {
		if err != nil {
			return err
		}
	}
	if len(raw.mapName) > maxMapName { // not worth a copy
		return badName()
	}
	op.MapName = d.internMapName(raw.mapName)
	if err := CheckMapName(op.MapName); err != nil {
		return err
	}
	if err := CheckKey(alias(raw.key)); err != nil {
		return err
	}
	op.Key = string(raw.key)
	if op.Kind = raw.opKind(); op.Kind == 0 {
		return badMessage("opType must be PUT, REMOVE, OR_ADD or OR_REMOVE")
	}
	if raw.hasRecord && raw.hasORRecord {
		return badMessage("an operation has record or orRecord, not both")
	}
	switch op.Kind {
	case OpPut, OpRemove:
		return d.finishLWW(op, raw)
	case OpORAdd:
		return d.finishORAdd(op, raw)
	default:
		return d.finishORRemove(op, raw)
	}
}

func (d *decoder) finishORAdd(op *Op, raw *rawOp) *Error {
	if !raw.hasORRecord {
		return badMessage("orRecord is missing; want a map")
	}
	if err := d.checkTag(raw.record.tag); err != nil {
		return err
	}
	op.Record, op.Tag = raw.record.Record, string(raw.record.tag)
	return d.checkValue(op.Record.Value)
}

func (d *decoder) finishORRemove(op *Op, raw *rawOp) *Error {
	if len(raw.tag) == 0 {
		return badMessage("orTag is missing; want the tag of the record to remove")
	}
	if err := d.checkTag(raw.tag); err != nil {
		return err
	}
	if !raw.hasTimestamp {
		return noStamp()
	}
	op.Record.Timestamp, op.Tag = raw.timestamp, string(raw.tag)
	return nil
}

func noStamp() *Error {
	return badMessage("timestamp is missing; want a map of millis, counter and nodeId")
}

func (d *decoder) finishLWW(op *Op, raw *rawOp) *Error {
	switch {
	case raw.hasRecord:
		op.Record = raw.record.Record
	case op.Kind == OpRemove && raw.hasTimestamp:
		op.Record.Timestamp = raw.timestamp
	default:
		return badMessage("record is missing; want a map")
	}
	if op.Record.Deleted() {
		// What a client writes as null is a deletion everywhere (PROTOCOL 5.1).
		op.Kind = OpRemove
		return nil
	}
	if op.Kind == OpRemove {
		return badMessage("the record of a REMOVE must have the value nil")
	}
	return d.checkValue(op.Record.Value)
}

// opKind reads or infers the kind (PROTOCOL 10.1).
func (raw *rawOp) opKind() OpKind {
	if raw.kind != nil {
		return kindOf(raw.kind)
	}
	switch {
	case raw.hasORRecord:
		return OpORAdd
	case raw.tag != nil:
		return OpORRemove
	case raw.hasRecord && !raw.record.Deleted():
		return OpPut
	}
	return OpRemove
}

// kindOf returns the kind with a name on the wire, 0 if there is none.
func kindOf(name []byte) OpKind {
	switch string(name) {
	case "PUT":
		return OpPut
	case "REMOVE":
		return OpRemove
	case "OR_ADD":
		return OpORAdd
	case "OR_REMOVE":
		return OpORRemove
	}
	return 0
}

// checkValue returns why a client must not write this value, or nil.
func (d *decoder) checkValue(v []byte) *Error {
	switch {
	case len(v) > d.lim.MaxValueBytes:
		return &Error{Name: ValueTooLarge, Code: 413, Text: "the value is too large"}
	case d.tooDeep(v):
		return &Error{Name: ValueTooDeep, Code: 400, Text: "the value is nested deeper than 128 containers"}
	case d.hasForeign(v):
		return foreignValue()
	case bytes.Contains(v, []byte(protoField)) && hasField(v, protoField):
		return reservedName("the value has a field that JavaScript clients rename")
	}
	return nil
}

// tooDeep reports whether a value is nested deeper than values may be.
func (d *decoder) tooDeep(v []byte) bool {
	if !d.deep || len(v) == 0 {
		return false
	}
	_, err := msgval.Check(v)
	return err != nil
}

// hasForeign reports whether a value holds an extension that the TypeScript client
// cannot read: it would drop the whole frame that the value comes in (PROTOCOL 2.3).
func (d *decoder) hasForeign(v []byte) bool {
	if !d.foreign || len(v) == 0 {
		return false
	}
	_, shape, err := msgval.Scan(v, msgval.MaxDepth)
	return err == nil && shape.Foreign
}

func foreignValue() *Error {
	return &Error{Name: BadMessage, Code: 400, Text: "the value holds a msgpack extension that clients cannot read; the only one they know is the timestamp, -1"}
}

// hasField reports whether any map within a value has a field of this name.
func hasField(v []byte, name string) bool {
	// Containers are entered by reading on behind their heads. open holds, for
	// each container that has not ended, how many values are to come in it.
	type container struct {
		left  int
		isMap bool
	}
	open := make([]container, 0, 16)
	for len(v) > 0 {
		h, _ := msgval.ReadHead(v)
		v = v[h.Size:]
		if n := len(open); n > 0 {
			c := &open[n-1]
			isKey := c.isMap && c.left%2 == 0
			c.left--
			if isKey && h.Kind == msgval.StrKind && string(v[:h.N]) == name {
				return true
			}
		}
		if h.Kind.Container() {
			open = append(open, container{int(h.Values()), h.Kind == msgval.MapKind})
		} else {
			v = v[h.N:]
		}
		for len(open) > 0 && open[len(open)-1].left == 0 {
			open = open[:len(open)-1]
		}
	}
	return false
}

func isMap(v []byte) bool {
	h, ok := msgval.ReadHead(v)
	return ok && h.Kind == msgval.MapKind
}

// rawRecord is a record with its tag, if it is of an OR map.
type rawRecord struct {
	lwwmap.Record
	tag []byte
}

// recordForm says how a record is read.
type recordForm uint8

const (
	// clientStamps holds the stamp to the rules for those that clients make.
	clientStamps recordForm = 1 << iota
	// orRecord: a tag is needed, and a nil or missing value is the value nil. In
	// other records it is a tombstone.
	orRecord
)

// record reads a record. It reads all of it whatever is wrong with it, so that
// what follows can be read too.
func (d *decoder) record(into *rawRecord, form recordForm) *Error {
	*into = rawRecord{}
	n, ok := d.mapHeader()
	if !ok {
		return badMessage("a record must be a map")
	}
	stamped := false
	var keyErr, ttlErr, stampErr, tagErr *Error
	for range n {
		key, ok := d.str()
		if !ok {
			keyErr = badMessage("the keys of a record must be strings")
			d.skip()
			continue
		}
		switch string(key) {
		case "value":
			if into.Value = nil; !d.isNil() {
				into.Value = d.raw()
			}
		case "timestamp":
			stamped = true
			if form&clientStamps != 0 {
				into.Timestamp, stampErr = d.clientStamp()
			} else {
				into.Timestamp, stampErr = d.stamp()
			}
		case "ttlMs":
			into.TTLMillis, ttlErr = d.ttl()
		case "tag":
			into.tag, tagErr = d.bytes("tag")
		default:
			d.skip()
		}
	}
	if into.Deleted() {
		if form&orRecord != 0 {
			into.Value = msgval.AppendNil(nil)
		} else {
			into.TTLMillis = 0 // a tombstone does not expire
		}
	}
	switch {
	case keyErr != nil:
		return keyErr
	case stampErr != nil:
		return stampErr
	case ttlErr != nil:
		return ttlErr
	case tagErr != nil:
		return tagErr
	case !stamped:
		return badMessage("the timestamp of a record is missing; want a map of millis, counter and nodeId")
	case form&orRecord != 0 && len(into.tag) == 0:
		return badMessage("the tag of an OR record is missing; want a string")
	}
	return nil
}

// serverRecord reads a record that a server sent.
func (d *decoder) serverRecord(into *lwwmap.Record) *Error {
	var raw rawRecord
	err := d.record(&raw, 0)
	*into = raw.Record
	return err
}

// ttl reads a time to live in ms, or nil, which is none. A fraction is cut off,
// which makes no difference to clocks that tick in ms, but never down to none.
func (d *decoder) ttl() (uint64, *Error) {
	if d.isNil() {
		return 0, nil
	}
	f, isFloat, n, ok := d.number()
	if isFloat {
		if ok = f >= 0 && f <= float64(maxTTL); ok { // not for NaN
			if n = uint64(f); n == 0 && f > 0 {
				n = 1
			}
		}
	}
	if !ok || n > uint64(maxTTL) {
		return 0, &Error{Name: BadTTL, Code: 400, Text: "ttlMs must be a number of ms from 0 to ten years"}
	}
	return n, nil
}

// clientStamp reads a stamp that a client made.
func (d *decoder) clientStamp() (hlc.Timestamp, *Error) {
	t, err := d.stamp()
	if err != nil || t.NodeID == d.clientNode && t.NodeID != "" {
		return t, err
	}
	if err = checkNodeID(t.NodeID); err == nil {
		d.clientNode = t.NodeID
	}
	return t, err
}

// stamp reads a stamp: millis and counter are integers, the node id is any
// string of bounded length.
func (d *decoder) stamp() (t hlc.Timestamp, err *Error) {
	n, ok := d.mapHeader()
	if !ok {
		return t, badMessage("a timestamp must be a map of millis, counter and nodeId")
	}
	const millis, counter, node = 1, 2, 4
	var seen, bad int
	for range n {
		key, ok := d.str()
		if !ok {
			err = badMessage("the keys of a timestamp must be strings")
			d.skip()
			continue
		}
		var field int
		switch string(key) {
		case "millis":
			field = millis
			t.Millis, ok = d.integer()
		case "counter":
			field = counter
			t.Counter, ok = d.integer()
		case "nodeId":
			field = node
			var s []byte
			if s, ok = d.str(); len(s) > maxStoredNodeID {
				err = badTimestamp("a nodeId is too long")
			} else if ok {
				t.NodeID = d.internNodeID(s)
			}
		default:
			d.skip()
		}
		seen |= field
		bad &^= field
		if !ok {
			bad |= field
		}
	}
	switch {
	case err != nil:
		return t, err
	case bad&node != 0:
		return t, badMessage("nodeId must be a string")
	case bad != 0:
		return t, badMessage("millis and counter must be integers from 0 to 2^53")
	case seen != millis|counter|node:
		return t, badMessage("a timestamp must have millis, counter and nodeId")
	}
	return t, nil
}

// id reads the id of an op, and reports whether it can be named in an answer. Ids are
// decimal text (PROTOCOL 10.1); an integer is taken as the same text, since refusing it
// would cost the whole batch: an answer could not say which op is broken.
func (d *decoder) id(into *string) bool {
	if h, _ := msgval.ReadHead(d.rest()); h.Kind != msgval.StrKind {
		n, ok := d.integer()
		*into = strconv.FormatUint(n, 10)
		return ok
	}
	text, ok := d.str()
	*into = alias(text)
	return ok && validID(*into)
}
