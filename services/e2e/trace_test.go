package e2e

import (
	"context"
	"encoding/hex"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"
)

// spans is an OpenTelemetry collector that keeps the names of the spans it is sent,
// by trace.
type spans struct {
	collector.UnimplementedTraceServiceServer
	mu     sync.Mutex
	traces map[string][]string
}

func (s *spans) Export(_ context.Context, req *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, resource := range req.ResourceSpans {
		for _, scope := range resource.ScopeSpans {
			for _, span := range scope.Spans {
				id := hex.EncodeToString(span.TraceId)
				s.traces[id] = append(s.traces[id], span.Name)
			}
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

// One op can be followed from the socket to the database.
func TestOneTraceFromSocketToDatabase(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	s := &spans{traces: make(map[string][]string)}
	server := grpc.NewServer()
	collector.RegisterTraceServiceServer(server, s)
	go server.Serve(listener)
	t.Cleanup(server.Stop)

	stories(t, options{collector: listener.Addr().String()}, func(t *testing.T, c Cluster) {
		s.mu.Lock()
		clear(s.traces)
		s.mu.Unlock()
		a := open(t, webSocket(gateway(c, 0)), "trace-a")
		must(t, a.Map("trace").Set("k", 1))
		flush(t, a)
		want := []string{"gateway.op_batch", "partition.apply", "lane.append", "persistence.store"}
		eventually(t, deadline, func() error {
			s.mu.Lock()
			defer s.mu.Unlock()
			var seen []string
			for _, names := range s.traces {
				if !slices.ContainsFunc(want, func(name string) bool { return !slices.Contains(names, name) }) {
					return nil
				}
				seen = append(seen, fmt.Sprint(names))
			}
			return fmt.Errorf("no trace has all of %v; traces: %v", want, seen)
		})
	})
}
