package client

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/tinylib/msgp/msgp"

	"github.com/topgun-sync/topgun/core/msgval"
)

// EncodeValue returns the msgpack form of a Go value: nil, booleans, integers,
// finite floats, strings, []byte, []any and map[string]any directly, anything
// else, such as structs, as encoding/json would write it. Map keys are sorted, so
// equal values have equal bytes.
func EncodeValue(v any) ([]byte, error) {
	b, err := appendValue(nil, v, 0)
	if err != nil {
		return nil, err
	}
	if _, err := msgval.Check(b); err != nil {
		return nil, err
	}
	return b, nil
}

func appendValue(b []byte, v any, depth int) ([]byte, error) {
	if depth > msgval.MaxDepth { // before the recursion has cost anything; Check decides exactly
		return nil, msgval.ErrTooDeep
	}
	switch v := v.(type) {
	case nil:
		return msgp.AppendNil(b), nil
	case bool:
		return msgp.AppendBool(b, v), nil
	case int:
		return msgp.AppendInt64(b, int64(v)), nil
	case int64:
		return msgp.AppendInt64(b, v), nil
	case uint64:
		return msgp.AppendUint64(b, v), nil
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return nil, errors.New("value holds a number that is not finite")
		}
		return msgp.AppendFloat64(b, v), nil
	case string:
		return msgp.AppendString(b, v), nil
	case []byte:
		return msgp.AppendBytes(b, v), nil
	case []any:
		b = msgp.AppendArrayHeader(b, uint32(len(v)))
		for _, e := range v {
			var err error
			if b, err = appendValue(b, e, depth+1); err != nil {
				return nil, err
			}
		}
		return b, nil
	case map[string]any:
		b = msgp.AppendMapHeader(b, uint32(len(v)))
		for _, key := range slices.Sorted(maps.Keys(v)) {
			var err error
			b = msgp.AppendString(b, key)
			if b, err = appendValue(b, v[key], depth+1); err != nil {
				return nil, err
			}
		}
		return b, nil
	}
	text, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode value: %w", err)
	}
	raw, err := msgval.FromJSON(text)
	if err != nil {
		return nil, fmt.Errorf("encode value: %w", err)
	}
	return append(b, raw...), nil
}

// DecodeValue returns the Go form of one msgpack value: nil, bool, int64, uint64,
// float64, string, []byte, []any or map[string]any. It returns an error for what
// has none of these forms, such as extensions and maps with keys that are not
// strings.
func DecodeValue(raw []byte) (any, error) {
	if _, err := msgval.Check(raw); err != nil { // before a recursive decoder reads it
		return nil, err
	}
	v, _, err := msgp.ReadIntfBytes(raw)
	if err != nil {
		return nil, fmt.Errorf("decode value: %w", err)
	}
	return v, nil
}

func isNil(raw []byte) bool { return bytes.Equal(raw, []byte{0xc0}) }
