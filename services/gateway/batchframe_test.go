package gateway

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"testing"

	"github.com/gobwas/ws"

	"github.com/topgun-sync/topgun/core/wire"
)

// waiting is a batch of frames, of which those from the first'th on are live events.
func waiting(bufs net.Buffers, first int) *batch {
	b := &batch{bufs: bufs}
	for i := range bufs {
		b.loose = append(b.loose, i >= first)
	}
	return b
}

// TestGather: small live events that wait together travel as one BATCH, in order and
// unchanged; all else as it is.
func TestGather(t *testing.T) {
	small := func(i int) []byte { return compile(&wire.SyncRespBuckets{MapName: fmt.Sprint("map", i)}) }
	big := compile(&wire.TopicMessage{Topic: "t", Data: packed(strings.Repeat("x", gatherEach))})
	several := append(small(1), small(2)...)
	pong := appendFrame(nil, ws.OpPong, make([]byte, 60))
	last := appendFrame(nil, ws.OpClose, make([]byte, 60))
	for name, c := range map[string]struct {
		bufs  net.Buffers
		first int
		want  string // what comes of it: frames as they are, or BATCHes of so many
	}{
		"one":             {net.Buffers{small(1)}, 0, "="},
		"two":             {net.Buffers{small(1), small(2)}, 0, "= ="},
		"three":           {net.Buffers{small(1), small(2), small(3)}, 0, "3"},
		"others":          {net.Buffers{small(1), small(2), small(3), small(4)}, 1, "= 3"},
		"others of three": {net.Buffers{small(1), small(2), small(3)}, 1, "= = ="},
		"around a big":    {net.Buffers{small(1), small(2), small(3), big, small(4), small(5), small(6)}, 0, "3 = 3"},
		"few beside big":  {net.Buffers{small(1), small(2), big, small(4), small(5)}, 0, "= = = = ="},
		"several in one":  {net.Buffers{small(1), several, small(3), small(4), small(5)}, 0, "= = 3"},
		"control frames":  {net.Buffers{pong, small(1), small(2), small(3), last}, 0, "= 3 ="},
	} {
		var before, got []string
		for _, b := range c.bufs {
			before = append(before, string(b))
		}
		var inner []string
		for _, out := range waiting(c.bufs, c.first).gather() {
			payloads := batched(t, out)
			if payloads == nil {
				got = append(got, "=")
				inner = append(inner, string(out))
				continue
			}
			got = append(got, fmt.Sprint(len(payloads)))
			for _, payload := range payloads {
				inner = append(inner, string(appendFrame(nil, ws.OpBinary, payload)))
			}
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
		if strings.Join(inner, "") != strings.Join(before, "") {
			t.Errorf("%s: the frames changed", name)
		}
	}
}

// batched returns the payloads within a frame; nil if it is no BATCH.
func batched(t *testing.T, frame []byte) (payloads [][]byte) {
	t.Helper()
	payload := singlePayloadOf(t, frame)
	if payload == nil || !bytes.Contains(payload[:min(16, len(payload))], []byte("BATCH")) {
		return nil
	}
	if len(payload) > 64<<10 {
		t.Errorf("a BATCH of %d bytes", len(payload))
	}
	m, err := wire.DecodeServer(payload)
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range m.(*wire.Batch).Messages {
		payloads = append(payloads, one.AppendTo(nil))
	}
	return payloads
}

func singlePayloadOf(t *testing.T, frame []byte) []byte {
	t.Helper()
	h, err := ws.ReadHeader(bytes.NewReader(frame))
	if err != nil {
		t.Fatal(err)
	}
	if head := ws.HeaderSize(h); h.OpCode == ws.OpBinary && len(frame) == head+int(h.Length) {
		return frame[head:]
	}
	return nil
}

// Whatever waits, gathering it changes nothing but the frames, and uses its memory again.
func TestGatherKeepsEverything(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var b batch
	for range 200 {
		var bufs net.Buffers
		var want []string
		for i := range random.IntN(writeFrames) {
			m := &wire.TopicMessage{Topic: fmt.Sprint("topic", i), Data: packed(strings.Repeat("x", random.IntN(1<<random.IntN(15))))}
			want = append(want, string(m.AppendTo(nil)))
			bufs = append(bufs, compile(m))
		}
		n := len(bufs)
		w := waiting(bufs, 0)
		b.bufs, b.loose = w.bufs, w.loose
		out := b.gather()
		if len(out) > n {
			t.Fatalf("%d frames of %d", len(out), n)
		}
		var got []string
		for _, frame := range out {
			payloads := batched(t, frame)
			if payloads == nil {
				payloads = [][]byte{singlePayloadOf(t, frame)}
			}
			for _, payload := range payloads {
				got = append(got, string(payload))
			}
		}
		if strings.Join(got, "|") != strings.Join(want, "|") {
			t.Fatal("frames changed")
		}
	}
}

// A client that was slow gets what waited in BATCHes.
func TestBatchesReachTheClient(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	p.synced("m", 0)
	s := b.service.sockets.snapshot()[0]
	holdWriter(t, s)
	const n = 20
	for i := range n {
		b.partition.put("m", fmt.Sprint("k", i), packed("v"), stamp(1))
	}
	eventually(t, func() bool { return queued(s) == n })
	s.mu.Lock()
	s.out.writing = false
	s.startWriterLocked()
	s.mu.Unlock()
	for i := range n {
		if e := expect[*wire.ServerEvent](p); e.Key != fmt.Sprint("k", i) {
			t.Fatalf("event %d: %+v", i, e)
		}
	}
	if p.batches != 1 {
		t.Errorf("%d batches", p.batches)
	}
	p.ping()
}

// What a client must see in order never travels in a BATCH: the original client lets
// what comes behind one overtake what is in it.
func TestOnlyEventsAreBatched(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	p.send(&wire.TopicSub{Topic: "t"})
	p.ping()
	b.fanout.awaitTopic(t, "t", true)
	s := b.service.sockets.snapshot()[0]
	holdWriter(t, s)
	const n = 20
	q := b.hello(t)
	for i := range n {
		q.send(&wire.TopicPub{Topic: "t", Data: packed(fmt.Sprint(i))})
	}
	eventually(t, func() bool { return queued(s) == n })
	s.mu.Lock()
	s.out.writing = false
	s.startWriterLocked()
	s.mu.Unlock()
	for i := range n {
		if m := expect[*wire.TopicMessage](p); !bytes.Equal(m.Data, packed(fmt.Sprint(i))) {
			t.Fatalf("message %d: %+v", i, m)
		}
	}
	if p.batches != 0 {
		t.Errorf("%d batches", p.batches)
	}
}

// BenchmarkWrite is what one write of waiting frames costs, the system call included.
func BenchmarkWrite(b *testing.B) {
	for _, size := range []int{100, 1000} {
		for _, n := range []int{1, 2, 3, 10, 100} {
			b.Run(fmt.Sprintf("%dx%dB", n, size), func(b *testing.B) {
				server, client := tcpPair(b)
				go func() {
					buf := make([]byte, 1<<20)
					for {
						if _, err := client.Read(buf); err != nil {
							return
						}
					}
				}()
				frame := compile(&wire.TopicMessage{Topic: "topic", Data: packed(strings.Repeat("x", size))})
				var work batch
				for _, mode := range []string{"gathered", "apart"} {
					b.Run(mode, func(b *testing.B) {
						b.ReportAllocs()
						for range b.N {
							work.bufs, work.loose = work.bufs[:0], work.loose[:0]
							for range n {
								work.bufs, work.loose = append(work.bufs, frame), append(work.loose, mode == "gathered")
							}
							bufs := work.gather()
							work.bufs = bufs[:0]
							var err error
							if len(bufs) == 1 {
								_, err = server.Write(bufs[0])
							} else {
								_, err = bufs.WriteTo(server)
							}
							if err != nil {
								b.Fatal(err)
							}
						}
					})
				}
			})
		}
	}
}

func tcpPair(b *testing.B) (server, client net.Conn) {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	if client, err = net.Dial("tcp", l.Addr().String()); err != nil {
		b.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _, _ = server.Close(), client.Close() })
	return server, client
}

func queued(s *session) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.events
}

// holdWriter keeps frames from being written, as if a write were under way.
func holdWriter(t *testing.T, s *session) {
	t.Helper()
	eventually(t, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		idle := !s.out.writing
		s.out.writing = true
		return idle
	})
}
