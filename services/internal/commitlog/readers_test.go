package commitlog

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"time"
)

// wantReaders waits until the stream has so many consumers, and no more than so many
// goroutines run. The server ends those of a deleted consumer after it has answered.
func wantReaders(t *testing.T, l *Log, consumers, goroutines int) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		info, err := l.stream.Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		running := runtime.NumGoroutine()
		if info.State.Consumers == consumers && running <= goroutines {
			return
		}
		if time.Now().After(deadline) {
			var names []string
			for name := range l.stream.ConsumerNames(t.Context()).Name() {
				names = append(names, name)
			}
			stacks := make([]byte, 1<<20)
			t.Fatalf("%d consumers %v and %d goroutines are left, want %d and at most %d\n%s", info.State.Consumers,
				names, running, consumers, goroutines, stacks[:runtime.Stack(stacks, true)])
		}
		runtime.Gosched()
	}
}

// TestReadersLeaveNothing ends readers in every way there is, and each at many moments:
// what the server and the client keep for a reader must go with it, and not only once
// the server has missed it for a minute.
func TestReadersLeaveNothing(t *testing.T) {
	l := open(t, connect(t), testConfig())
	a := openLane(t, l, "a")
	appendTo(t, a, claimCommit())
	for range 20 {
		appendTo(t, a, changes("k", 10))
	}
	read(t, l)                                   // what the server starts once
	wantReaders(t, l, 0, runtime.NumGoroutine()) // the reader is gone when its loop is
	baseline := runtime.NumGoroutine()

	loop := func(ctx context.Context, follow bool, commits int) (err error) {
		for _, err = range l.Read(ctx, 1, follow) {
			if commits--; err != nil || commits == 0 {
				break
			}
		}
		return err
	}
	t.Run("end", func(t *testing.T) {
		for range 50 {
			read(t, l)
		}
		wantReaders(t, l, 0, baseline+2) // this test's own
	})
	t.Run("break", func(t *testing.T) {
		for i := range 100 {
			if err := loop(t.Context(), i%2 == 0, 1+i%20); err != nil {
				t.Fatal(err)
			}
		}
		wantReaders(t, l, 0, baseline+2)
	})
	t.Run("cancel", func(t *testing.T) {
		for i := range 200 {
			// A reader takes about half a millisecond to begin.
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*10*time.Microsecond)
			if err := loop(ctx, true, 0); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("a follower ended with %v", err)
			}
			cancel()
		}
		wantReaders(t, l, 0, baseline+2)
	})
	t.Run("expired", func(t *testing.T) {
		for i := range 100 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*20*time.Microsecond)
			_, _ = l.Expired(ctx, time.Now(), 0) // as far as it came
			cancel()
		}
		wantReaders(t, l, 0, baseline+2)
	})
	t.Run("error", func(t *testing.T) {
		if _, err := l.js.Publish(t.Context(), subjectPrefix+"b", []byte("garbage")); err != nil {
			t.Fatal(err)
		}
		for i := range 50 {
			if err := loop(t.Context(), i%2 == 0, 0); !errors.Is(err, ErrUnreadable) {
				t.Fatalf("reading garbage ended with %v", err)
			}
		}
		wantReaders(t, l, 0, baseline+2)
	})
}

// TestAFollowerEndsWithoutItsStream takes the stream away under a follower, which can
// then neither go on nor be told anything.
func TestAFollowerEndsWithoutItsStream(t *testing.T) {
	l := open(t, connect(t), testConfig())
	appendTo(t, openLane(t, l, "a"), claimCommit())
	ended := make(chan error, 1)
	begun := make(chan struct{})
	go func() {
		for _, err := range l.Read(t.Context(), 1, true) {
			if err != nil {
				ended <- err
				return
			}
			close(begun)
		}
	}()
	<-begun
	if err := l.js.DeleteStream(t.Context(), l.name); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err == nil {
			t.Error("the follower ended without an error")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the follower goes on without a stream")
	}
}
