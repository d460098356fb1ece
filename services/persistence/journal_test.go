package persistence_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	connect "connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"

	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1/persistencev1connect"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/persistence"
)

// changesCommit is a commit of changes of two shards.
func changesCommit(lane string, changes ...*typesv1.Change) *logv1.Commit {
	half := len(changes) / 2
	return &logv1.Commit{Version: 1, Lane: lane, Body: &logv1.Commit_Changes{Changes: &logv1.Changes{Shards: []*logv1.ShardChanges{
		{Shard: 1, Changes: changes[:half]}, {Shard: 2, Changes: changes[half:]},
	}}}}
}

func with(c *typesv1.Change, change func(c *typesv1.Change)) *typesv1.Change {
	change(c)
	return c
}

// ofEveryKind are changes of which the journal shows those with the keys shown.
func ofEveryKind() (changes []*typesv1.Change, shown []string) {
	changes = []*typesv1.Change{
		change("put", "1", 1),
		with(change("devices", "1", 2), func(c *typesv1.Change) { c.Map = "$devices" }),
		with(change("update", "2", 3), func(c *typesv1.Change) { c.Replaced, c.Kind = true, typesv1.Kind_KIND_LWW }),
		with(change("delete", "", 4), func(c *typesv1.Change) { c.Replaced = true }),
		with(change("likes", "1", 5), func(c *typesv1.Change) { c.Kind, c.Map, c.Tag = typesv1.Kind_KIND_COUNTER, "+likes", "node" }),
		with(change("add", "3", 6), func(c *typesv1.Change) { c.Kind, c.Map, c.Tag = typesv1.Kind_KIND_OR, "_tags", "1:0:a" }),
		with(change("again", "4", 7), func(c *typesv1.Change) {
			c.Kind, c.Map, c.Tag, c.Replaced = typesv1.Kind_KIND_OR, "_tags", "1:0:a", true
		}),
		with(change("remove", "", 8), func(c *typesv1.Change) { c.Kind, c.Map, c.Tag = typesv1.Kind_KIND_OR, "_tags", "1:0:a" }),
		with(change("door", "1", 9), func(c *typesv1.Change) { c.Kind, c.Map = typesv1.Kind_KIND_LOCK, "!locks" }),
		with(change("delete", "", 10), func(c *typesv1.Change) { c.Record, c.Pruned = nil, true }),
		with(change("remove", "", 11), func(c *typesv1.Change) {
			c.Kind, c.Map, c.Tag, c.Pruned = typesv1.Kind_KIND_OR, "_tags", "1:0:a", true
		}),
	}
	shown = []string{
		"0 PUT todos/put", "2 UPDATE todos/update", "3 DELETE todos/delete",
		"5 PUT _tags/add/1:0:a", "6 UPDATE _tags/again/1:0:a", "7 DELETE _tags/remove/1:0:a",
	}
	return changes, shown
}

func showEntry(e *persistencev1.JournalEntry) string {
	c := e.GetChange()
	s := fmt.Sprintf("%d %s %s/%s", e.GetSequence()&(1<<20-1), strings.TrimPrefix(e.GetType().String(), "JOURNAL_TYPE_"), c.GetMap(), c.GetKey())
	if c.GetTag() != "" {
		s += "/" + c.GetTag()
	}
	return s
}

func showEntries(entries []*persistencev1.JournalEntry) (shown []string) {
	for _, e := range entries {
		shown = append(shown, showEntry(e))
	}
	return shown
}

func TestReadJournal(t *testing.T) {
	log, store := newFakeLog(), newFakeStore()
	// What is not stored yet is shown as well.
	store.down = persistence.ErrUnavailable
	service, _ := start(t, config(), persistence.Deps{Store: store, Log: log})
	client := dial(service)
	read := func(from uint64, limit uint32, filter *persistencev1.JournalFilter) *persistencev1.ReadJournalResponse {
		t.Helper()
		response, err := client.ReadJournal(t.Context(), &persistencev1.ReadJournalRequest{FromSequence: from, Limit: limit, Filter: filter})
		if err != nil {
			t.Fatalf("read the journal: %v", err)
		}
		return response
	}
	if got := read(0, 0, nil); len(got.GetEntries()) != 0 || got.GetMore() {
		t.Errorf("an empty log shows %v", got)
	}
	log.append("a") // a claim
	changes, shown := ofEveryKind()
	log.put(changesCommit("a", changes...), nil)
	got := read(0, 0, nil)
	if s := showEntries(got.GetEntries()); !slices.Equal(s, shown) || got.GetMore() {
		t.Errorf("the journal shows %q, more: %t; want %q", s, got.GetMore(), shown)
	}
	for _, e := range got.GetEntries() {
		if e.GetSequence()>>20 != 2 || !proto.Equal(e.GetChange(), changes[e.GetSequence()&(1<<20-1)]) {
			t.Errorf("entry %d is %v", e.GetSequence(), e)
		}
	}
	filter := func(mapName string, types ...persistencev1.JournalType) *persistencev1.JournalFilter {
		return &persistencev1.JournalFilter{Map: mapName, Types: types}
	}
	const put, update, remove = persistencev1.JournalType_JOURNAL_TYPE_PUT, persistencev1.JournalType_JOURNAL_TYPE_UPDATE, persistencev1.JournalType_JOURNAL_TYPE_DELETE
	for name, c := range map[string]struct {
		from   uint64
		limit  uint32
		filter *persistencev1.JournalFilter
		want   []string
		more   bool
	}{
		"a map":                         {0, 0, filter("todos"), shown[:3], false},
		"another map":                   {0, 0, filter("_tags"), shown[3:], false},
		"no such map":                   {0, 0, filter("none"), nil, false},
		"puts":                          {0, 0, filter("", put), []string{shown[0], shown[3]}, false},
		"updates and deletes of a map":  {0, 0, filter("todos", update, remove), shown[1:3], false},
		"exactly as many as there are":  {0, 6, nil, shown, false},
		"one less":                      {0, 5, nil, shown[:5], true},
		"as many as match":              {0, 3, filter("todos"), shown[:3], false},
		"one less than match":           {0, 2, filter("todos"), shown[:2], true},
		"from the middle of the commit": {2<<20 + 3, 0, nil, shown[2:], false},
		"from between":                  {2<<20 + 4, 1, nil, shown[3:4], true},
		"from the last":                 {2<<20 + 7, 1, nil, shown[5:], false},
		"from behind the last":          {2<<20 + 8, 1, nil, nil, false},
		"from a commit that is not":     {3 << 20, 1, nil, nil, false},
		"from the end of all numbers":   {1<<64 - 1, 1, nil, nil, false},
		"the oldest":                    {0, 1, nil, shown[:1], true},
	} {
		got := read(c.from, c.limit, c.filter)
		if s := showEntries(got.GetEntries()); !slices.Equal(s, c.want) || got.GetMore() != c.more {
			t.Errorf("%s: the journal shows %q, more: %t; want %q, %t", name, s, got.GetMore(), c.want, c.more)
		}
	}
	for name, req := range map[string]*persistencev1.ReadJournalRequest{
		"limit":       {Limit: 1001},
		"type":        {Filter: filter("", persistencev1.JournalType_JOURNAL_TYPE_UNSPECIFIED)},
		"unknown":     {Filter: filter("", 9)},
		"ours":        {Filter: filter("$devices")},
		"long map":    {Filter: filter(strings.Repeat("m", 129))},
		"counter map": {Filter: filter("+likes")},
	} {
		if _, err := client.ReadJournal(t.Context(), req); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	log.edit(func() { log.down = errDown })
	if _, err := client.ReadJournal(t.Context(), &persistencev1.ReadJournalRequest{}); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("a log that is away gives %v", err)
	}
}

// TestJournalPagesAreBounded reads values of the largest size.
func TestJournalPagesAreBounded(t *testing.T) {
	log := newFakeLog()
	service, _ := start(t, config(), persistence.Deps{Store: newFakeStore(), Log: log})
	client := dial(service)
	for i := range uint64(40) {
		log.append("a", with(change(fmt.Sprint(i), "x", i+1), func(c *typesv1.Change) { c.Record.Value = make([]byte, 256<<10) }))
	}
	seen, from, pages := 0, uint64(0), 0
	for more := true; more; pages++ {
		response, err := client.ReadJournal(t.Context(), &persistencev1.ReadJournalRequest{FromSequence: from, Limit: 1000})
		if err != nil {
			t.Fatal(err)
		}
		if size := proto.Size(response); size > 4<<20 {
			t.Errorf("a page has %d bytes", size)
		}
		seen += len(response.GetEntries())
		from = response.GetEntries()[len(response.GetEntries())-1].GetSequence() + 1
		more = response.GetMore()
	}
	if seen != 40 || pages != 3 {
		t.Errorf("%d entries came in %d pages", seen, pages)
	}
}

// TestSearchGoesOn asks for what is rare in a log that takes an hour to read, a
// minute at a time: every answer is exact, and there is one in the end.
func TestSearchGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, store := newFakeLog(), newFakeStore()
		store.down = persistence.ErrUnavailable // so that only the journal reads
		for i := range uint64(1000) {
			c := change(fmt.Sprint(i), "1", i+1)
			if i == 400 || i == 401 || i == 800 {
				c.Map = "rare"
			}
			log.append("a", c)
		}
		log.slow = 100 * time.Millisecond
		service, _ := start(t, config(), persistence.Deps{Store: store, Log: log})
		client := dial(service)
		var got []string
		calls := 0
		for from, more := uint64(0), true; more; calls++ {
			ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
			response, err := client.ReadJournal(ctx, &persistencev1.ReadJournalRequest{
				FromSequence: from, Limit: 2, Filter: &persistencev1.JournalFilter{Map: "rare"},
			})
			if ctx.Err() != nil {
				t.Fatal("the answer came too late")
			}
			cancel()
			if connect.CodeOf(err) == connect.CodeDeadlineExceeded && calls < 100 {
				continue
			}
			if err != nil {
				t.Fatalf("read: %v", err)
			}
			got = append(got, showEntries(response.GetEntries())...)
			from = response.GetEntries()[len(response.GetEntries())-1].GetSequence() + 1
			more = response.GetMore()
		}
		if want := []string{"0 PUT rare/400", "0 PUT rare/401", "0 PUT rare/800"}; !slices.Equal(got, want) {
			t.Errorf("found %q, want %q", got, want)
		}
		if calls < 20 || calls > 40 {
			t.Errorf("it took %d calls", calls)
		}
	})
}

// TestSearchesWait wants no more than two searches at once.
func TestSearchesWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, store := newFakeLog(), newFakeStore()
		store.down = persistence.ErrUnavailable
		for i := range uint64(10) {
			log.append("a", change("x", "1", i+1))
		}
		log.slow = 100 * time.Millisecond
		service, _ := start(t, config(), persistence.Deps{Store: store, Log: log})
		client := dial(service)
		begin := time.Now()
		var wg sync.WaitGroup
		for range 6 {
			wg.Go(func() {
				if _, err := client.ReadJournal(t.Context(), &persistencev1.ReadJournalRequest{}); err != nil {
					t.Errorf("read: %v", err)
				}
			})
		}
		wg.Wait()
		if took := time.Since(begin); took != 3*time.Second {
			t.Errorf("six searches of a second took %v", took)
		}
	})
}

// followJournal follows until the test ends.
func followJournal(t *testing.T, client persistencev1connect.PersistenceServiceClient, req *persistencev1.FollowJournalRequest) (stream persistencev1connect.PersistenceServiceFollowJournalClientStream, leave func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := client.FollowJournal(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	leave = sync.OnceFunc(func() {
		cancel()
		_ = stream.Close() // it was ended
	})
	t.Cleanup(leave)
	first, err := stream.Receive()
	if err != nil || len(first.GetEntries()) != 0 {
		t.Fatalf("the first message is %v, %v; want an empty one", first, err)
	}
	return stream, leave
}

// TestFollowJournal follows from the beginning, from the middle and from now on,
// while the log is written to: each follower must see what reading shows.
func TestFollowJournal(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "")
	service, _ := start(t, config(), persistence.Deps{Store: newFakeStore(), Log: w.log})
	client := dial(service)
	stop := w.writing(t)
	w.let(300)
	var wg sync.WaitGroup
	seen := make([][]uint64, 6)
	for i := range seen {
		from := []uint64{1, 100<<20 + 2, 0}[i%3]
		filter := &persistencev1.JournalFilter{}
		if i >= 3 {
			filter.Types = []persistencev1.JournalType{persistencev1.JournalType_JOURNAL_TYPE_DELETE}
		}
		stream, leave := followJournal(t, client, &persistencev1.FollowJournalRequest{FromSequence: from, Filter: filter})
		w.let(50)
		wg.Go(func() {
			defer leave()
			for {
				response, err := stream.Receive()
				if err != nil {
					t.Errorf("follower %d: %v", i, err)
					return
				}
				for _, e := range response.GetEntries() {
					seen[i] = append(seen[i], e.GetSequence())
					if string(e.GetChange().GetKey()) == "last" {
						return
					}
				}
			}
		})
	}
	w.let(300)
	stop()
	// The last entry is one that all followers want.
	lane, err := w.log.OpenLane("last")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lane.Append(t.Context(), changesCommit("last", change("last", "", 1<<40))); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	for i, got := range seen {
		filter := &persistencev1.JournalFilter{}
		if i >= 3 {
			filter.Types = []persistencev1.JournalType{persistencev1.JournalType_JOURNAL_TYPE_DELETE}
		}
		from := []uint64{1, 100<<20 + 2, 0}[i%3]
		if from == 0 {
			if len(got) == 0 || got[0]>>20 < 300 {
				t.Errorf("follower %d of what comes begins at %v", i, got[:min(len(got), 1)])
				continue
			}
			from = got[0]
		}
		var want []uint64
		for more := true; more; {
			response, err := client.ReadJournal(t.Context(), &persistencev1.ReadJournalRequest{FromSequence: from, Limit: 500, Filter: filter})
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range response.GetEntries() {
				want = append(want, e.GetSequence())
				from = e.GetSequence() + 1
			}
			more = response.GetMore()
		}
		if !slices.Equal(got, want) {
			t.Errorf("follower %d saw %d entries, the journal has %d; first and last %v, %v", i, len(got), len(want), got[:1], got[len(got)-1:])
		}
	}
}

// wantSequences receives until so many entries came, and wants those of commits from
// first on, each once.
func wantSequences(t *testing.T, stream persistencev1connect.PersistenceServiceFollowJournalClientStream, first, last uint64) {
	t.Helper()
	for next := first; next <= last; {
		response, err := stream.Receive()
		if err != nil {
			t.Fatalf("receive: %v", err)
		}
		for _, e := range response.GetEntries() {
			if e.GetSequence() != next<<20 {
				t.Fatalf("received commit %d, want %d", e.GetSequence()>>20, next)
			}
			next++
		}
	}
}

// TestFollowersSwitchWithoutGap has the common reader take commits between the last
// that a follower reads by itself and its joining.
func TestFollowersSwitchWithoutGap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newFakeLog()
		service, _ := start(t, config(), persistence.Deps{Store: newFakeStore(), Log: log})
		client := dial(service)
		for i := range uint64(10) {
			log.append("a", change("x", "1", i+1))
		}
		_, _ = followJournal(t, client, &persistencev1.FollowJournalRequest{})
		time.Sleep(time.Second)
		asked := 0
		log.edit(func() {
			log.asked = func() {
				if asked++; asked <= 2 { // the follower asks before and after the past
					log.append("a", change("x", "1", 100))
					log.append("a", change("x", "1", 100))
					synctest.Wait()
				}
			}
		})
		stream, _ := followJournal(t, client, &persistencev1.FollowJournalRequest{FromSequence: 1})
		wantSequences(t, stream, 1, 14)
		if asked != 2 {
			t.Errorf("the log was asked for its end %d times", asked)
		}
		log.append("a", change("x", "1", 200))
		wantSequences(t, stream, 15, 15)
	})
}

// TestFollowersSwitchWithoutRepetition has the common reader lag behind what a
// follower reads by itself.
func TestFollowersSwitchWithoutRepetition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newFakeLog()
		service, _ := start(t, config(), persistence.Deps{Store: newFakeStore(), Log: log})
		client := dial(service)
		_, _ = followJournal(t, client, &persistencev1.FollowJournalRequest{})
		time.Sleep(time.Second)
		log.edit(func() { log.slowFollow = 100 * time.Millisecond })
		for i := range uint64(10) {
			log.append("a", change("x", "1", i+1))
		}
		stream, _ := followJournal(t, client, &persistencev1.FollowJournalRequest{FromSequence: 1})
		wantSequences(t, stream, 1, 10)
		log.append("a", change("x", "1", 200))
		wantSequences(t, stream, 11, 11)
	})
}

// TestSlowFollowerEnds does not receive while more is appended than may wait.
func TestSlowFollowerEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newFakeLog()
		service, _ := start(t, config(), persistence.Deps{Store: newFakeStore(), Log: log})
		client := dial(service)
		slow, _ := followJournal(t, client, &persistencev1.FollowJournalRequest{})
		other, _ := followJournal(t, client, &persistencev1.FollowJournalRequest{Filter: &persistencev1.JournalFilter{Map: "quiet"}})
		synctest.Wait()
		big := func(i uint64) *typesv1.Change {
			return with(change(fmt.Sprint(i), "x", i+1), func(c *typesv1.Change) { c.Record.Value = make([]byte, 256<<10) })
		}
		for i := range uint64(60) {
			log.append("a", big(i))
			synctest.Wait()
		}
		log.append("a", with(change("q", "1", 1), func(c *typesv1.Change) { c.Map = "quiet" }))
		if response, err := other.Receive(); err != nil || len(response.GetEntries()) != 1 {
			t.Errorf("another follower receives %v, %v", response, err)
		}
		next := uint64(1) << 20
		for {
			response, err := slow.Receive()
			if err != nil {
				if connect.CodeOf(err) != connect.CodeResourceExhausted {
					t.Errorf("the slow follower ends with %v", err)
				}
				break
			}
			for _, e := range response.GetEntries() {
				if e.GetSequence() != next {
					t.Fatalf("received %d, want %d", e.GetSequence(), next)
				}
				next += 1 << 20
			}
		}
		if next>>20 > 50 {
			t.Errorf("the slow follower ended only at commit %d", next>>20)
		}
		// It goes on where it was.
		again, _ := followJournal(t, client, &persistencev1.FollowJournalRequest{FromSequence: next})
		if response, err := again.Receive(); err != nil || response.GetEntries()[0].GetSequence() != next {
			t.Errorf("following again receives %v, %v", response, err)
		}
	})
}

func TestFollowersEnd(t *testing.T) {
	for name, c := range map[string]struct {
		happens func(log *fakeLog, stop func())
		want    connect.Code
	}{
		"the log goes away": {func(log *fakeLog, _ func()) { log.edit(func() { log.down = errDown }) }, connect.CodeUnavailable},
		"the log is replaced": {func(log *fakeLog, _ func()) {
			log.edit(func() { log.entries, log.last = nil, 0 })
		}, connect.CodeOutOfRange},
		"the service stops": {func(_ *fakeLog, stop func()) { stop() }, connect.CodeUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log := newFakeLog()
				service, stop := start(t, config(), persistence.Deps{Store: newFakeStore(), Log: log})
				log.append("a", change("x", "1", 1))
				client := dial(service)
				live, _ := followJournal(t, client, &persistencev1.FollowJournalRequest{})
				past, _ := followJournal(t, client, &persistencev1.FollowJournalRequest{FromSequence: 1})
				if response, err := past.Receive(); err != nil || len(response.GetEntries()) != 1 {
					t.Fatalf("received %v, %v", response, err)
				}
				time.Sleep(time.Second)
				c.happens(log, stop)
				for _, stream := range []persistencev1connect.PersistenceServiceFollowJournalClientStream{live, past} {
					if _, err := stream.Receive(); connect.CodeOf(err) != c.want {
						t.Errorf("following ends with %v, want %v", err, c.want)
					}
				}
			})
		})
	}
}

// TestFollowersComeAndGo leaves the reader alone, and has it back at once.
func TestFollowersComeAndGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newFakeLog()
		service, _ := start(t, config(), persistence.Deps{Store: newFakeStore(), Log: log})
		client := dial(service)
		for i := range uint64(50) {
			stream, leave := followJournal(t, client, &persistencev1.FollowJournalRequest{})
			if i%2 == 0 {
				synctest.Wait()
			}
			sequence := log.append("a", change("x", "1", i+1))
			response, err := stream.Receive()
			if err != nil || len(response.GetEntries()) != 1 || response.GetEntries()[0].GetSequence() != sequence<<20 {
				t.Fatalf("follower %d receives %v, %v; want sequence %d", i, response, err, sequence<<20)
			}
			leave()
		}
	})
}

func TestFollowJournalRefuses(t *testing.T) {
	log := newFakeLog()
	service, _ := start(t, config(), persistence.Deps{Store: newFakeStore(), Log: log})
	client := dial(service)
	log.append("a", change("x", "1", 1))
	for name, c := range map[string]struct {
		req  *persistencev1.FollowJournalRequest
		want connect.Code
	}{
		"from another log": {&persistencev1.FollowJournalRequest{FromSequence: 3 << 20}, connect.CodeOutOfRange},
		"a type":           {&persistencev1.FollowJournalRequest{Filter: &persistencev1.JournalFilter{Types: []persistencev1.JournalType{7}}}, connect.CodeInvalidArgument},
	} {
		stream, err := client.FollowJournal(t.Context(), c.req)
		if err == nil {
			_, err = stream.Receive()
			_ = stream.Close()
		}
		if connect.CodeOf(err) != c.want {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	// The position behind the last entry is where a follower that has seen all goes on.
	followJournal(t, client, &persistencev1.FollowJournalRequest{FromSequence: 1<<20 + 1})
	followJournal(t, client, &persistencev1.FollowJournalRequest{FromSequence: 2 << 20})
}

// TestJournalIsKept wants the log trimmed by age and size for the journal, and never
// what is not stored.
func TestJournalIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, store := newFakeLog(), newFakeStore()
		c := config()
		c.JournalAge, c.JournalBytes = time.Hour, 10_000
		_, _ = start(t, c, persistence.Deps{Store: store, Log: log})
		size := 0
		for i := range uint64(60) {
			sequence := log.append("a", change("x", fmt.Sprint(i), i+1))
			log.mu.Lock()
			size = log.entries[len(log.entries)-1].Size
			log.mu.Unlock()
			time.Sleep(time.Minute)
			if upTo := log.trimmed()["a"]; upTo > 1 {
				t.Fatalf("after %d minutes trimmed up to %d", sequence, upTo)
			}
		}
		time.Sleep(30 * time.Minute)
		if upTo := log.trimmed()["a"]; upTo < 28 || upTo > 32 {
			t.Errorf("half an hour later trimmed up to %d, want 30", upTo)
		}
		// Many at once: the size ends it before the age does.
		for i := range uint64(1000) {
			log.append("a", change("x", fmt.Sprint(i), i+100))
		}
		time.Sleep(10 * time.Minute)
		want := 1060 - uint64(10_000/size)
		if upTo := log.trimmed()["a"]; upTo < want-20 || upTo > want+20 {
			t.Errorf("of commits of %d bytes all below %d were trimmed, want about %d", size, upTo, want)
		}
		// What is not stored stays, however old and large.
		store.set(func() { store.before = func(persistence.Batch) error { time.Sleep(10 * time.Hour); return nil } })
		stored := uint64(1060)
		for i := range uint64(1000) {
			log.append("a", change("x", fmt.Sprint(i), i+2000))
		}
		time.Sleep(5 * time.Hour)
		if upTo := log.trimmed()["a"]; upTo > stored {
			t.Errorf("trimmed up to %d, though only %d is stored", upTo, stored)
		}
		log.mu.Lock()
		defer log.mu.Unlock()
		if n := len(log.entries); n < 1000 {
			t.Errorf("only %d commits are left", n)
		}
	})
}
