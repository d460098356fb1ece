package main

import (
	"database/sql"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	_ "modernc.org/sqlite" // the store's file is changed behind the server's back

	"github.com/topgun-sync/topgun/services/allinone"
	"github.com/topgun-sync/topgun/services/cmd/topgunctl/internal/verify"
)

// many is n records of one LWW-map and one OR-map.
func many(n int, millis uint64) string {
	var lines strings.Builder
	for i := range n {
		fmt.Fprintf(&lines, `{"map":"many","kind":"lww","key":"k%d","value":{"n":%d},"stamp":{"millis":%d,"counter":%d,"nodeId":"a"}}`+"\n", i, i, millis, i)
		fmt.Fprintf(&lines, `{"map":"many","kind":"or","key":"k%d","tag":"t%d","value":%d,"stamp":{"millis":%d,"counter":%d,"nodeId":"a"}}`+"\n", i/3, i, i, millis, i)
	}
	return lines.String()
}

func sorted(text string) []string {
	return slices.Sorted(strings.SplitSeq(strings.TrimSpace(text), "\n"))
}

func TestWhatIsExportedImportsIntoAnotherServer(t *testing.T) {
	const n = 6000 // more than a page of Since
	one, two := start(t, memoryConfig()), start(t, memoryConfig())
	millis := recent()
	one.must(t, sample(millis)+many(n, millis), "import")
	exported := one.must(t, "", "export", "todos", "tags", "many", "--tombstones")
	if got := strings.Count(exported, "\n"); got != 8+2*n {
		t.Fatalf("%d lines", got)
	}
	if live := one.must(t, "", "export", "todos"); strings.Contains(live, "deleted") || strings.Count(live, "\n") != 5 {
		t.Errorf("without tombstones: %s", live)
	}
	file := filepath.Join(t.TempDir(), "dump")
	if err := os.WriteFile(file, []byte(exported), 0o600); err != nil {
		t.Fatal(err)
	}
	var counts imported
	for _, want := range []imported{{Lines: 8 + 2*n, Applied: 8 + 2*n}, {Lines: 8 + 2*n, Duplicate: 8 + 2*n}} {
		counts = imported{}
		if err := json.Unmarshal([]byte(two.must(t, "", "--json", "import", file)), &counts); err != nil || fmt.Sprint(counts) != fmt.Sprint(want) {
			t.Fatalf("%+v, %v; want %+v", counts, err, want)
		}
	}
	if !slices.Equal(sorted(two.must(t, "", "export", "todos", "tags", "many", "--tombstones")), sorted(exported)) {
		t.Error("the second server's export is another one")
	}
	// Into the first one it changes nothing either.
	if err := json.Unmarshal([]byte(one.must(t, exported, "--json", "import")), &counts); err != nil || counts.Duplicate != 8+2*n {
		t.Errorf("%+v, %v", counts, err)
	}
	for _, s := range []server{one, two} {
		s.must(t, "", "verify")
	}
}

func TestImportStopsAtALineThatIsWrongAndSaysWhich(t *testing.T) {
	s := start(t, memoryConfig())
	lines := sample(recent())
	first, rest, _ := strings.Cut(lines, "\n")
	r := s.ctl(t, first+"\n\n{oops}\n"+rest, "import")
	if r.code != exitFailed || !strings.Contains(r.err, "line 3: want one JSON object") || !strings.Contains(r.out, "\n1      1 ") {
		t.Errorf("%+v", r)
	}
	r = s.ctl(t, strings.Repeat("x", maxLine+1), "import")
	if r.code != exitFailed || !strings.Contains(r.err, "line 1: ") {
		t.Errorf("%+v", r)
	}
	// What the server rejects is counted, and the rest is taken.
	r = s.ctl(t, strings.Replace(lines, `"todos"`, `"1"`, 1)+`{"map":"todos","kind":"lww","key":"old","value":1,"stamp":{"millis":1,"nodeId":"a"}}`, "import")
	if r.code != exitFailed || !strings.Contains(r.out, "the first rejected line is 1\n") ||
		!strings.Contains(r.out, "1 times: BAD_MAP_NAME") || !strings.Contains(r.out, "--tombstone-retention 0s") {
		t.Errorf("%+v", r)
	}
	// A stamp from the future is replaced, and again the same way.
	future := fmt.Sprintf(`{"map":"todos","kind":"lww","key":"f","value":1,"stamp":{"millis":%d,"nodeId":"a"}}`, time.Now().Add(time.Hour).UnixMilli())
	for range 2 {
		var counts imported
		if err := json.Unmarshal([]byte(s.must(t, future, "--json", "import")), &counts); err != nil || counts.Restamped != 1 {
			t.Errorf("%+v, %v", counts, err)
		}
	}
	s.must(t, "", "verify")
}

// The negative control: rows are changed behind the server's back.
func TestVerifyFindsWhatTheStoreDoesNotHold(t *testing.T) {
	config := allinone.DefaultConfig(t.TempDir())
	s := start(t, config)
	millis := recent()
	s.must(t, sample(millis)+many(100, millis), "import")
	s.must(t, "", "verify")

	db, err := sql.Open("sqlite", config.Persistence.SQLitePath+"?_pragma=busy_timeout(5000)")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	for _, change := range []string{
		`UPDATE records SET value = x'c3' WHERE map = 'todos' AND key_text = 'milk' AND kind = 0`,
		`UPDATE records SET counter = 99 WHERE map = 'todos' AND key_text = 'milk' AND tag = CAST('t1' AS BLOB)`,
		`DELETE FROM records WHERE map = 'many' AND key_text = 'k7' AND kind = 0`,
		`INSERT INTO records SELECT 'ghosts', key, kind, tag, key_text, partition, value, value_json, millis, counter, node_id,
			arrival_millis, arrival_counter, deleted, ttl_millis, expires_at, restamped FROM records WHERE map = 'many' AND key_text = 'k8' AND kind = 0`,
	} {
		done, err := db.ExecContext(t.Context(), change)
		if err != nil {
			t.Fatalf("%s: %v", change, err)
		}
		if rows, err := done.RowsAffected(); err != nil || rows != 1 {
			t.Fatalf("%s: %d rows, %v", change, rows, err)
		}
	}
	r := s.ctl(t, "", "verify")
	if r.code != exitFailed || !strings.Contains(r.err, "differ") {
		t.Errorf("%+v", r)
	}
	golden(t, r.out, `
MAP     KIND  RECORDS  STORED  LEAVES  DIFFERENCES  CHANGING
ghosts  lww   0        1       0       1            0
many    lww   100      99      75      1            0
many    or    100      100     30      0            0
tags    or    1        1       1       0            0
todos   lww   4        4       4       1            0
todos   or    3        3       1       1            0

MAP     KIND  KEY        WHAT                     IN MEMORY                                                            IN THE STORE
ghosts  lww   k8         not in memory            -                                                                    MILLIS:8:a value #HASH, arrived TIME
many    lww   k7         not in the store         MILLIS:7:a value #HASH, arrived TIME  -
todos   lww   milk       memory and store differ  MILLIS:1:a value #HASH, arrived TIME  MILLIS:1:a value #HASH, arrived TIME
todos   or    milk [t1]  memory and store differ  MILLIS:5:a value #HASH, arrived TIME  MILLIS:99:a value #HASH, arrived TIME`)
	r = s.ctl(t, "", "--json", "verify", "todos")
	var report verify.Report
	if err := json.Unmarshal([]byte(r.out), &report); err != nil || r.code != exitFailed || report.Equal || len(report.Maps) != 2 || len(report.Differences) != 2 {
		t.Errorf("%+v: %v", r, err)
	}
	s.must(t, "", "verify", "tags")
}

func TestVerifyTakesNoWriteForADifference(t *testing.T) {
	s := start(t, memoryConfig())
	s.must(t, many(300, recent()), "import")
	stop := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				s.ctl(t, many(20, recent()+uint64(i)), "import")
			}
		}
	})
	for range 3 {
		if r := s.ctl(t, "", "verify"); r.code != exitOK {
			t.Errorf("%+v", r)
		}
	}
	close(stop)
	writer.Wait()
}
