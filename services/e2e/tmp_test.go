package e2e
import ("testing";"time";"fmt";"syscall")
func TestTmpFreeze(t *testing.T) {
	c := newFourProcesses(t, options{}).(*fourProcesses)
	w := startWriter(t, webSocket(gateway(c, 0)), "w", "tmp")
	h := startWriter(t, gateway(c, 1), "h", "tmp")
	for _, role := range []string{"nats","partition","fanout","persistence","gateway-1"} {
		w.allow(300); h.allow(300)
		w.waitAcked(t, w.ackedNow()+100)
		p := c.role(role)
		p.cmd.Process.Signal(syscall.SIGSTOP)
		time.Sleep(17*time.Second)
		p.cmd.Process.Signal(syscall.SIGCONT)
		t0 := time.Now()
		n := w.ackedNow(); w.allow(300); h.allow(300)
		w.waitAcked(t, n+9)
		h.waitAcked(t, h.ackedNow()+1)
		fmt.Println("ACKED AGAIN", role, "after", time.Since(t0))
		fresh := open(t, webSocket(gateway(c, 1)), "fresh-"+role)
		fm := fresh.Map("tmp")
		must(t, fm.WaitSynced(within(t, deadline)))
		for _, x := range []*writer{w,h} { if k := x.lost(fm, n); x==w && k>0 { t.Fatal("lost", k) } }
		fmt.Println("synced", role, "after", time.Since(t0))
		fresh.Close()
	}
	w.stop(); h.stop(); flush(t, w.client); flush(t, h.client)
	eventually(t, deadline, func() error { if w.m.Digest()!=h.m.Digest() { return fmt.Errorf("differ") }; return nil })
	sameRows(t, c, "tmp", w.m.Digest())
}
