package msgval

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// AppendJSON appends the JSON form of a value to dst. It returns dst unchanged
// and false if the value has none that databases and JavaScript agree on: byte
// strings, extensions, NaN and infinities, strings with bytes that are not UTF-8, maps with keys that are no strings or twice the same. Integers
// are written with all their digits.
func AppendJSON(dst, value []byte) ([]byte, bool) {
	out, rest, ok := appendJSON(dst, value, 0)
	if !ok || len(rest) != 0 {
		return dst, false
	}
	return out, true
}

func appendJSON(dst, b []byte, depth int) (out, rest []byte, ok bool) {
	h, ok := ReadHead(b)
	if !ok || depth > maxScanDepth {
		return nil, nil, false
	}
	b = b[h.Size:]
	switch h.Kind {
	case NilKind:
		return append(dst, "null"...), b, true
	case BoolKind:
		return strconv.AppendBool(dst, h.Num == 1), b, true
	case UintKind:
		return strconv.AppendUint(dst, h.Num, 10), b, true
	case IntKind:
		return strconv.AppendInt(dst, int64(h.Num), 10), b, true
	case FloatKind:
		f := math.Float64frombits(h.Num)
		if math.IsNaN(f) || math.IsInf(f, 0) {
			return nil, nil, false
		}
		return appendJSONFloat(dst, f), b, true
	case StrKind:
		if h.N > uint64(len(b)) {
			return nil, nil, false
		}
		dst, ok = appendJSONString(dst, b[:h.N])
		return dst, b[h.N:], ok
	case ArrayKind:
		dst = append(dst, '[')
		for i := range h.N {
			if i > 0 {
				dst = append(dst, ',')
			}
			if dst, b, ok = appendJSON(dst, b, depth+1); !ok {
				return nil, nil, false
			}
		}
		return append(dst, ']'), b, true
	case MapKind:
		return appendJSONMap(dst, b, h.N, depth)
	}
	return nil, nil, false
}

func appendJSONMap(dst, b []byte, n uint64, depth int) (out, rest []byte, ok bool) {
	dst = append(dst, '{')
	var few [16][]byte
	keys := few[:0]
	for i := range n {
		if i > 0 {
			dst = append(dst, ',')
		}
		h, ok := ReadHead(b)
		if !ok || h.Kind != StrKind || h.N > uint64(len(b)-h.Size) {
			return nil, nil, false
		}
		keys = append(keys, b[h.Size:h.Size+int(h.N)])
		if dst, b, ok = appendJSON(dst, b, depth+1); !ok {
			return nil, nil, false
		}
		dst = append(dst, ':')
		if dst, b, ok = appendJSON(dst, b, depth+1); !ok {
			return nil, nil, false
		}
	}
	slices.SortFunc(keys, bytes.Compare)
	for i := 1; i < len(keys); i++ {
		if bytes.Equal(keys[i-1], keys[i]) {
			return nil, nil, false
		}
	}
	return append(dst, '}'), b, true
}

// appendJSONFloat writes the shortest digits that read back as f. An integral f
// within ±2^53 is written as the integer that it is to every reader; beyond that
// an exponent says that it is none.
func appendJSONFloat(dst []byte, f float64) []byte {
	if f == math.Trunc(f) && math.Abs(f) <= maxSafe {
		return strconv.AppendInt(dst, int64(f), 10)
	}
	if a := math.Abs(f); a < 1e-6 || a > maxSafe {
		return strconv.AppendFloat(dst, f, 'e', -1, 64)
	}
	return strconv.AppendFloat(dst, f, 'f', -1, 64)
}

func appendJSONString(dst, s []byte) ([]byte, bool) {
	if !utf8.Valid(s) {
		return nil, false
	}
	const hex = "0123456789abcdef"
	dst = append(dst, '"')
	for _, c := range s {
		switch {
		case c == '"' || c == '\\':
			dst = append(dst, '\\', c)
		case c < 0x20:
			dst = append(dst, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		default:
			dst = append(dst, c)
		}
	}
	return append(dst, '"'), true
}

// ErrJSON is wrapped by every error of FromJSON.
var ErrJSON = errors.New("want one JSON text in UTF-8, nested at most 128 deep")

// FromJSON returns the msgpack form of a JSON text. Numbers that are written as
// integers become integers, all others float64; a number too large for that is an
// error. Escapes of unpaired surrogates become U+FFFD. Of
// equal keys all pairs are kept, in order. Check accepts the result.
func FromJSON(text []byte) ([]byte, error) {
	if !utf8.Valid(text) {
		return nil, fmt.Errorf("not UTF-8: %w", ErrJSON)
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()

	// The number of elements stands before them in msgpack and is known after
	// them here: each container is written without a head, which is put in when
	// it ends.
	type container struct {
		start int // where its contents begin in out
		n     int // values in it so far
		isMap bool
	}
	var open []container
	out := make([]byte, 0, len(text))
	for {
		token, err := dec.Token()
		if err != nil {
			return nil, fmt.Errorf("not JSON: %w", ErrJSON)
		}
		switch v := token.(type) {
		case json.Delim:
			if v == '{' || v == '[' {
				if len(open) == MaxDepth {
					return nil, fmt.Errorf("nested too deeply: %w", ErrJSON)
				}
				open = append(open, container{start: len(out), isMap: v == '{'})
				continue
			}
			c := open[len(open)-1]
			open = open[:len(open)-1]
			var head []byte
			if c.isMap {
				head = AppendMapHeader(nil, c.n/2)
			} else {
				head = AppendArrayHeader(nil, c.n)
			}
			out = slices.Insert(out, c.start, head...)
		case nil:
			out = AppendNil(out)
		case bool:
			out = AppendBool(out, v)
		case string:
			out = AppendString(out, v)
		case json.Number:
			if out, err = appendNumber(out, v); err != nil {
				return nil, err
			}
		}
		if len(open) == 0 {
			break
		}
		open[len(open)-1].n++
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, fmt.Errorf("something follows: %w", ErrJSON)
	}
	return out, nil
}

func appendNumber(dst []byte, n json.Number) ([]byte, error) {
	if u, err := strconv.ParseUint(n.String(), 10, 64); err == nil {
		return AppendUint(dst, u), nil
	}
	if i, err := strconv.ParseInt(n.String(), 10, 64); err == nil {
		return AppendInt(dst, i), nil
	}
	if !strings.ContainsAny(n.String(), ".eE") {
		return nil, fmt.Errorf("an integer beyond 64 bits would be rounded: %w", ErrJSON)
	}
	f, err := n.Float64()
	if err != nil {
		return nil, fmt.Errorf("number out of range: %w", ErrJSON)
	}
	return AppendFloat(dst, f), nil
}
