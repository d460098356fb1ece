package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/topgun-sync/topgun/client"
)

// sameEverywhere waits until a fresh client over either transport, and the database,
// hold what m holds.
func sameEverywhere(t *testing.T, c Cluster, m *client.Map) {
	t.Helper()
	for _, url := range []string{webSocket(gateway(c, 1)), gateway(c, 0)} {
		fresh := open(t, url, m.Name()+"-fresh-"+url[:2])
		fm := fresh.Map(m.Name())
		must(t, fm.WaitSynced(within(t, deadline)))
		eventually(t, deadline, func() error {
			if fm.Digest() != m.Digest() {
				return fmt.Errorf("over %s: %d values; want %d", url, fm.Len(), m.Len())
			}
			return nil
		})
		if fm.Root() != m.Root() {
			t.Errorf("over %s: equal content and other root", url)
		}
	}
	sameRows(t, c, m.Name(), m.Digest())
}

// Whatever a client may store comes back unchanged, whatever its key.
func oddKeysAndValues(t *testing.T, c Cluster) {
	const name = "odd.things-1" // every kind of character that a map name may have
	a := open(t, webSocket(gateway(c, 0)), name+"-a")
	m := a.Map(name)
	for _, key := range []string{
		"a", " ", "\n", "\x1b[31m", "ключ", "鍵", "👩‍👩‍👧", "e\u0301", "é", "../../etc/passwd", "*.>", "' OR 1=1 --",
		"a:b:c", "%00", `{"k":1}`, strings.Repeat("x", 512), strings.Repeat("ж", 256),
	} {
		must(t, m.Set(key, key))
	}
	deep := any("bottom")
	for range 100 {
		deep = []any{deep}
	}
	for key, value := range map[string]any{
		"int": math.MinInt64, "uint": uint64(math.MaxUint64), "float": 1.5, "integral float": 2.0, "large": 1e300,
		"minus zero": math.Copysign(0, -1), "bool": false, "empty string": "", "empty list": []any{}, "empty map": map[string]any{},
		"nil inside": []any{nil}, "bytes": []byte{0, 0xff}, "NUL": "a\x00b", "deep": deep,
		"wide": map[string]any{"a": 1, "": 2, "ж": []any{1, "x", map[string]any{"y": nil}}},
	} {
		must(t, m.Set("value: "+key, value))
	}
	must(t, m.Delete("never there"))
	flush(t, a)
	sameEverywhere(t, c, m)
	fresh := open(t, gateway(c, 1), name+"-types")
	must(t, fresh.Map(name).WaitSynced(within(t, deadline)))
	for key, want := range m.Records() {
		if got, _ := fresh.Map(name).Record(key); !bytes.Equal(got.Value, want.Value) {
			t.Errorf("key %q: value % x came back as % x", key, want.Value, got.Value)
		}
	}
}

// Values of the largest size pass through batches, the log, pages and events.
func largeValues(t *testing.T, c Cluster) {
	const name = "large_values"
	a := open(t, webSocket(gateway(c, 0)), name+"-a")
	b := open(t, webSocket(gateway(c, 1)), name+"-b")
	am, bm := a.Map(name), b.Map(name)
	must(t, bm.WaitSynced(within(t, deadline)))
	const size = 256<<10 - 5 // with its header, the most a server takes
	for i := range 20 {
		must(t, am.Set(fmt.Sprint(i), bytes.Repeat([]byte{byte(i)}, size)))
	}
	flush(t, a)
	eventually(t, deadline, func() error {
		if bm.Digest() != am.Digest() {
			return errors.New("the other client holds other content")
		}
		return nil
	})
	sameEverywhere(t, c, am)
}

// One client works on many maps at once.
func manyMaps(t *testing.T, c Cluster) {
	a := open(t, webSocket(gateway(c, 0)), "many-a")
	b := open(t, webSocket(gateway(c, 1)), "many-b")
	const maps = 200
	for i := range maps {
		must(t, a.Map(fmt.Sprintf("many_%d", i)).Set("k", i))
	}
	flush(t, a)
	for i := range maps {
		m := b.Map(fmt.Sprintf("many_%d", i))
		must(t, m.WaitSynced(within(t, deadline)))
		if v, _ := m.Get("k"); v != int64(i) {
			t.Errorf("%s holds %v", m.Name(), v)
		}
	}
}
