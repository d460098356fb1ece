package fanout

import (
	"cmp"
	"slices"
	"sort"

	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"

	"github.com/topgun-sync/topgun/core/query"
)

// arrival is a shard's stamp of a change, see typesv1.Arrival.
type arrival struct{ millis, counter uint64 }

func arrivalOf(a *typesv1.Arrival) arrival { return arrival{a.GetMillis(), a.GetCounter()} }

func (a arrival) compare(b arrival) int {
	return cmp.Or(cmp.Compare(a.millis, b.millis), cmp.Compare(a.counter, b.counter))
}

func (a arrival) after(b arrival) bool { return a.compare(b) > 0 }

func later(a, b arrival) arrival {
	if b.after(a) {
		return b
	}
	return a
}

// coverage says which changes are in the rows that a read brought: of each shard
// those up to an arrival, and of a read of several pages those that the page of the
// key covers. It does not change once it is in use.
type coverage struct {
	// upTo is indexed by shard.
	upTo []arrival
	// pages is empty for a read of one page; order is the order of the keys.
	pages []page
	order *query.Query
}

// page is a page of a scan of one node, in the order of the keys.
type page struct {
	// shards is where the node's shards are true.
	shards []bool
	// through is the last key of the page; the last page has every later key too.
	through string
	last    bool
	upTo    []arrival
}

// has says whether a change of a key is in the rows.
func (c *coverage) has(shard uint32, key string, at arrival) bool {
	if int(shard) >= len(c.upTo) || at.after(c.upTo[shard]) {
		return false
	}
	// The pages of one node follow each other, the nodes too.
	first := slices.IndexFunc(c.pages, func(p page) bool { return p.shards[shard] })
	if first < 0 {
		return true
	}
	pages := c.pages[first:]
	if end := slices.IndexFunc(pages, func(p page) bool { return p.last }); end >= 0 {
		pages = pages[:end+1]
	}
	n := sort.Search(len(pages), func(n int) bool {
		return pages[n].last || c.order.Compare(query.Row{Key: key}, query.Row{Key: pages[n].through}) <= 0
	})
	return n < len(pages) && !at.after(pages[n].upTo[shard])
}

// least is, by shard, what every page covers.
func (c *coverage) least() []arrival {
	least := slices.Clone(c.upTo)
	for _, p := range c.pages {
		for shard, mine := range p.shards {
			if mine && least[shard].after(p.upTo[shard]) {
				least[shard] = p.upTo[shard]
			}
		}
	}
	return least
}

// equal compares the coverages of two reads of one page.
func (c *coverage) equal(o *coverage) bool {
	return len(c.pages)+len(o.pages) == 0 && slices.Equal(c.upTo, o.upTo)
}
