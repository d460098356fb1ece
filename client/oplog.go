package client

import (
	"slices"
	"strconv"

	"github.com/topgun-sync/topgun/core/wire"
)

// operation is one local write that the server has not answered yet.
type operation struct {
	id uint64
	wire.Op
}

// size is about the number of bytes the operation takes in a frame.
func (o *operation) size() int {
	const envelope = 256 // field names, two stamps without their node ids, headers
	return envelope + len(o.MapName) + len(o.Key) + len(o.Record.Value) + 2*len(o.Record.Timestamp.NodeID)
}

// opLog holds the unanswered operations in the order of their ids. The caller
// serialises access. Its bound is Config.MaxPending, checked by the writer.
type opLog struct {
	pending []operation
	last    uint64 // id of the newest operation ever logged
}

// append logs an operation under the next id.
func (l *opLog) append(op wire.Op) {
	l.last++
	op.ID = strconv.FormatUint(l.last, 10)
	l.pending = append(l.pending, operation{id: l.last, Op: op})
}

// after returns the index of the first pending operation with an id above id.
func (l *opLog) after(id uint64) int {
	i, found := slices.BinarySearchFunc(l.pending, id, func(o operation, id uint64) int {
		switch {
		case o.id < id:
			return -1
		case o.id > id:
			return 1
		}
		return 0
	})
	if found {
		i++
	}
	return i
}

// batch returns the pending operations after the given id that fit one message,
// at least one if there is any, and the id of the last.
func (l *opLog) batch(after uint64, maxOps, maxBytes int) (ops []wire.Op, last uint64) {
	last = after
	bytes := 0
	for i := l.after(after); i < len(l.pending) && len(ops) < maxOps; i++ {
		o := &l.pending[i]
		bytes += o.size()
		if len(ops) > 0 && bytes > maxBytes {
			break
		}
		ops = append(ops, o.Op)
		last = o.id
	}
	return ops, last
}

// dropThrough forgets every operation with an id up to id.
func (l *opLog) dropThrough(id uint64) (dropped bool) {
	n := l.after(id)
	if n == 0 {
		return false
	}
	clear(l.pending[:n]) // let go of the values
	l.pending = l.pending[n:]
	if len(l.pending) == 0 {
		l.pending = nil
	}
	return true
}

// drop forgets one operation and returns it.
func (l *opLog) drop(id uint64) (operation, bool) {
	n := l.after(id)
	if n == 0 || l.pending[n-1].id != id {
		return operation{}, false
	}
	op := l.pending[n-1]
	l.pending = slices.Delete(l.pending, n-1, n)
	return op, true
}

// first returns the id of the oldest pending operation, or 0.
func (l *opLog) first() uint64 {
	if len(l.pending) == 0 {
		return 0
	}
	return l.pending[0].id
}
