package partition

import (
	"bytes"
	"strings"
	"unicode/utf8"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/pncounter"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// Bounds of partition.proto and types.proto.
const (
	maxOps    = 10_000
	maxTag    = 256
	maxName   = 256 // of a counter
	maxOrigin = 128
	maxMap    = 128
	maxKey    = 512
	maxNode   = 128
	maxValue  = 256 << 10
	maxNumber = 1 << 53
)

// The maps of our own, which no client can name.
const (
	devicesMap    = "$devices" // an LWW-map: what is known of devices
	counterPrefix = "+"        // and a counter's name
)

// checkApply reports a request that its caller made wrong.
func checkApply(req *partitionv1.ApplyRequest) error {
	ops := 0
	for _, s := range req.GetShards() {
		if len(s.GetOps()) == 0 {
			return connect.NewError(connect.CodeInvalidArgument, "every entry needs at least one op")
		}
		if len(s.GetOrigin()) > maxOrigin {
			return connect.NewError(connect.CodeInvalidArgument, "origin must be at most 128 bytes")
		}
		ops += len(s.GetOps())
	}
	if ops > maxOps {
		return connect.NewError(connect.CodeInvalidArgument, "a request must carry at most 10000 ops")
	}
	return nil
}

// fillGroup converts ops, sharing their bytes, and rejects those that can never be
// applied. It returns false if a key belongs to another shard.
func fillGroup(g *group, ops *partitionv1.ShardOps, shards int) bool {
	g.origin = ops.GetOrigin()
	g.ops = make([]op, len(ops.GetOps()))
	for i, from := range ops.GetOps() {
		to := &g.ops[i]
		to.kind, to.table, to.key = kindOf(from.GetKind()), from.GetMap(), from.GetKey()
		to.record = recordFromProto(from.GetRecord())
		to.hash = merkle.HashBytes(to.key)
		if to.kind != lww {
			to.key = joinTag(to.key, []byte(from.GetTag()))
		}
		if to.reason = checkOp(from); to.reason != "" {
			to.outcome = rejected
		} else if shardOf(to.hash, shards) != int(ops.GetShard()) {
			return false
		}
		g.held += int64(opOverhead + len(to.key) + len(to.record.Value))
	}
	return true
}

// checkOp returns why an op can never be applied, or nothing. The texts are fixed:
// they reach clients and never repeat input.
func checkOp(o *partitionv1.Op) string {
	r, key := o.GetRecord(), o.GetKey()
	if reason := checkKind(o); reason != "" {
		return reason
	}
	switch {
	case len(key) == 0 || len(key) > maxKey || bytes.IndexByte(key, 0) >= 0 || !utf8.Valid(key):
		return "BAD_KEY: a key must be 1 to 512 bytes of UTF-8 without NUL"
	case r == nil:
		return "BAD_MESSAGE: the record is missing"
	case o.GetKind() == counter:
		return checkSides(r.GetValue())
	case !validStamp(r.GetTimestamp()):
		return "BAD_TIMESTAMP: millis and counter must be at most 2^53, the node id 1 to 128 bytes of UTF-8 without ':'"
	case len(r.GetValue()) > maxValue:
		return "VALUE_TOO_LARGE: a value must be at most 256 KiB"
	case len(r.GetValue()) > 0 && !validValue(r.GetValue()):
		return "BAD_MESSAGE: the value is not one msgpack value of bounded depth"
	}
	return ""
}

// checkKind checks what is different for each kind: the map's name and the tag.
func checkKind(o *partitionv1.Op) string {
	const badMap = "BAD_MAP_NAME: a map is named by a letter or '_' and up to 127 letters, digits, '_', '.', ':' or '-'"
	name, tag := o.GetMap(), o.GetTag()
	switch kindOf(o.GetKind()) {
	case lww:
		if !validMap(name) && name != devicesMap {
			return badMap
		}
		if tag != "" {
			return "BAD_TAG: a record of an LWW-map has no tag"
		}
	case or:
		if !validMap(name) {
			return badMap
		}
		if !validText(tag, maxTag) {
			return "BAD_TAG: a tag must be 1 to 256 bytes of UTF-8 without NUL"
		}
	case counter:
		key := string(o.GetKey())
		if name != counterPrefix+key || !validText(key, maxName) {
			return "BAD_NAME: a counter's map is '+' and its name, its key the name, 1 to 256 bytes of UTF-8 without NUL"
		}
		if !validText(tag, maxNode) {
			return "BAD_NODE: a counter's node must be 1 to 128 bytes of UTF-8 without NUL"
		}
	default:
		return "BAD_KIND: an op must be of the kind LWW, OR or COUNTER"
	}
	return ""
}

func checkSides(value []byte) string {
	sides, ok := pncounter.ParseSides(value)
	switch {
	case !ok:
		return "BAD_MESSAGE: the value of a counter's node must be an array of two integers that are not negative"
	case max(sides.Positive, sides.Negative) > pncounter.MaxSum:
		return reasonTooLarge
	}
	return ""
}

func validText(s string, most int) bool {
	return s != "" && len(s) <= most && strings.IndexByte(s, 0) < 0 && utf8.ValidString(s)
}

func validMap(name string) bool {
	if name == "" || len(name) > maxMap {
		return false
	}
	for i := range len(name) {
		c := name[i]
		letter := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '_'
		if !letter && (i == 0 || (c < '0' || c > '9') && c != '.' && c != ':' && c != '-') {
			return false
		}
	}
	return true
}

func validStamp(t *typesv1.Timestamp) bool {
	node := t.GetNodeId()
	return t != nil && t.GetMillis() <= maxNumber && t.GetCounter() <= maxNumber &&
		node != "" && len(node) <= maxNode && !strings.Contains(node, ":") && utf8.ValidString(node)
}

func validValue(value []byte) bool {
	rest, err := msgval.Check(value)
	return err == nil && len(rest) == 0
}
