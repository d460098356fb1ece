package wire

import (
	"slices"

	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/msgval"
)

const typeSyncRespLeaf = "SYNC_RESP_LEAF"

// LeafWriter writes a SYNC_RESP_LEAF frame record by record, straight from where
// records are stored to where frames are sent from. It allocates nothing but
// what the buffer grows by. Make it with BeginLeaf.
type LeafWriter struct {
	buf   []byte
	count int // where the number of records lies in buf
	n     int
}

// BeginLeaf begins a frame at the end of dst. The path is that of the request.
func BeginLeaf(dst []byte, mapName, path string) LeafWriter {
	dst = appendWrapped(dst, typeSyncRespLeaf, 3)
	dst = appendText(dst, "mapName", mapName)
	dst = appendText(dst, "path", path)
	dst = msgval.AppendString(dst, "records")
	// The number is not known. Room is left for that of an ordinary frame, and
	// End moves the records if it needs more or less.
	dst = append(dst, 0xdc)
	count := len(dst)
	return LeafWriter{buf: append(dst, 0, 0), count: count}
}

// Add appends a record.
func (w *LeafWriter) Add(key string, r lwwmap.Record) {
	dst := msgval.AppendMapHeader(w.buf, 2)
	dst = appendText(dst, "key", key)
	w.buf = appendRecord(dst, r)
	w.n++
}

// Count returns how many records were added.
func (w *LeafWriter) Count() int { return w.n }

// Size returns the size of what BeginLeaf was given with the frame so far.
func (w *LeafWriter) Size() int { return len(w.buf) }

// End completes the frame and returns what BeginLeaf was given with the frame.
// The writer must not be used afterwards.
func (w *LeafWriter) End() []byte {
	var buf [5]byte
	head := msgval.AppendArrayHeader(buf[:0], w.n)
	return slices.Replace(w.buf, w.count-1, w.count+2, head...)
}
