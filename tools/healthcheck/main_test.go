package main

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestCheck(t *testing.T) {
	t.Parallel()
	ready := true
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || r.URL.Path != "/health/ready" {
			t.Errorf("got %s %s, want GET /health/ready", r.Method, r.URL.Path)
		}
		if !ready {
			w.WriteHeader(http.StatusServiceUnavailable)
			io.WriteString(w, `{"ready":false,"reasons":["loading shard 3"]}`)
		}
	}))
	defer server.Close()
	address := strings.TrimPrefix(server.URL, "http://")

	if err := check(address); err != nil {
		t.Errorf("ready: got %v", err)
	}
	ready = false
	if err := check(address); err == nil || !strings.Contains(err.Error(), "loading shard 3") {
		t.Errorf("not ready: got %v, want an error with the reason", err)
	}
	server.Close()
	if err := check(address); err == nil {
		t.Error("nobody listens, and the check says ready")
	}
}
