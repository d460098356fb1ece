package gateway

import (
	"context"
	"sync"
	"time"

	"github.com/topgun-sync/topgun/core/merkle"
)

const (
	// treeAge is how old a tree may be that answers a bucket request.
	treeAge = 2 * time.Second
	// maxTrees bounds the kept trees, of about 20 KiB each. Above it a tree is read
	// and given to who waits for it, and not kept.
	maxTrees = 2048
)

// forest holds the Merkle trees of the maps that sessions are comparing, shared by
// all of them.
//
// A cold walk asks for up to 273 inner nodes of a map, each of which needs the leaves
// of every shard, so the tree is kept. It is kept here and not in the session because
// sessions come in crowds, after a restart or a gap, that ask for the same maps: one
// read serves all who wait. Two promises make sharing right:
//
//   - fresh returns a tree whose reading began after the call. Roots come from it, so
//     a root holds every change from before the session's map was watched, and every
//     op that the session was acked (SYN-04).
//   - recent never returns an older tree than fresh returned before, so a walk that
//     begins at a root cannot miss the difference that the root showed. Nodes may be
//     newer than the root; then the walk fetches records that the client gets, or
//     got, as events, which costs bytes and loses nothing.
//
// Records are always read from the owners.
type forest struct {
	k *sockets

	mu    sync.Mutex
	trees map[treeKey]*grove
}

type treeKey struct {
	of      mapKind
	name    string
	combine merkle.Combine
}

// grove is the newest tree of one key, and the reading of newer ones.
type grove struct {
	tree    *tree
	reading *reading // under way
	next    *reading // begins when reading has ended
}

// tree is the state of a map at some time.
type tree struct {
	*merkle.Tree
	state *mapState
	began time.Time
}

// reading is one read that several callers wait for.
type reading struct {
	done chan struct{}
	tree *tree
	err  error
}

func newForest(k *sockets) *forest {
	return &forest{k: k, trees: make(map[treeKey]*grove)}
}

// fresh returns a tree that was read after the call.
func (f *forest) fresh(ctx context.Context, of mapKind, name string, combine merkle.Combine) (*tree, error) {
	key := treeKey{of, name, combine}
	f.mu.Lock()
	g := f.trees[key]
	if g == nil {
		g = &grove{}
		f.trees[key] = g
	}
	var r *reading
	switch {
	case g.reading == nil:
		r = &reading{done: make(chan struct{})}
		g.reading = r
		f.k.wg.Go(func() { f.read(key, g) }) // a session of k.wg waits here, so k.wg is not 0
	case g.next == nil:
		r = &reading{done: make(chan struct{})}
		g.next = r
	default:
		r = g.next
	}
	f.mu.Unlock()
	select {
	case <-r.done:
		return r.tree, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// recent returns a tree that is at most treeAge old.
func (f *forest) recent(ctx context.Context, of mapKind, name string, combine merkle.Combine) (*tree, error) {
	f.mu.Lock()
	g := f.trees[treeKey{of, name, combine}]
	if g != nil && g.tree != nil && f.k.now().Sub(g.tree.began) <= treeAge {
		defer f.mu.Unlock()
		return g.tree, nil
	}
	f.mu.Unlock()
	return f.fresh(ctx, of, name, combine)
}

// read reads until nobody waits for another tree.
func (f *forest) read(key treeKey, g *grove) {
	for {
		began := f.k.now()
		ctx, cancel := context.WithTimeout(f.k.base, f.k.cfg.ReadTimeout)
		state, err := f.k.router.Leaves(ctx, key.of, key.name, key.combine)
		cancel()
		var t *tree
		if err == nil {
			t = &tree{Tree: merkle.NewTree(&state.leaves, key.combine), state: state, began: began}
		}
		f.mu.Lock()
		r := g.reading
		r.tree, r.err = t, err
		if err == nil {
			g.tree = t
		}
		g.reading, g.next = g.next, nil
		more := g.reading != nil
		if !more && (g.tree == nil || len(f.trees) > maxTrees) {
			delete(f.trees, key)
		}
		f.mu.Unlock()
		close(r.done)
		if !more {
			return
		}
	}
}

// expire drops the trees that are too old to be used.
func (f *forest) expire(now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for key, g := range f.trees {
		if g.reading == nil && g.tree != nil && now.Sub(g.tree.began) > treeAge {
			delete(f.trees, key)
		}
	}
}
