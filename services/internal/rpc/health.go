package rpc

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/pprof"
	"slices"
	"time"

	"connectrpc.com/connect/v2"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Checks tells, for each service by its full protobuf name (or by any name, where
// it serves no RPC), whether it can do its job: nil, or the reason why not. Checks
// must answer at once from what the service knows, may be called concurrently, and
// give reasons that people may read: no secrets, no client text.
type Checks map[string]func() error

// reasons lists what is not ready, in the order of names.
func (c Checks) reasons() []string {
	reasons := []string{}
	for _, name := range slices.Sorted(maps.Keys(c)) {
		if err := c[name](); err != nil {
			reasons = append(reasons, name+": "+err.Error())
		}
	}
	return reasons
}

// status answers for one service, or for all with an empty name.
func (c Checks) status(service string) (healthv1.HealthCheckResponse_ServingStatus, bool) {
	if service == "" {
		if len(c.reasons()) > 0 {
			return healthv1.HealthCheckResponse_NOT_SERVING, true
		}
		return healthv1.HealthCheckResponse_SERVING, true
	}
	check, ok := c[service]
	switch {
	case !ok:
		return healthv1.HealthCheckResponse_SERVICE_UNKNOWN, false
	case check() != nil:
		return healthv1.HealthCheckResponse_NOT_SERVING, true
	}
	return healthv1.HealthCheckResponse_SERVING, true
}

// healthPoll is how often Watch asks: checks are asked, they do not tell.
const healthPoll = time.Second

// registerHealth serves grpc.health.v1.Health.
func registerHealth(s *connect.Server, checks Checks) {
	methods := healthv1.File_grpc_health_v1_health_proto.Services().ByName("Health").Methods()
	spec := func(name protoreflect.Name, streamType connect.StreamType) connect.Spec {
		return connect.Spec{
			StreamType:       streamType,
			Schema:           methods.ByName(name),
			Procedure:        "/grpc.health.v1.Health/" + string(name),
			IdempotencyLevel: connect.IdempotencyNoSideEffects,
		}
	}
	s.Register(
		connect.Method{
			Spec: spec("Check", connect.StreamTypeUnary),
			Handler: func(_ context.Context, _ connect.Spec, stream connect.ServerStream) error {
				var request healthv1.HealthCheckRequest
				if err := stream.Receive(&request); err != nil {
					return err
				}
				status, ok := checks.status(request.GetService())
				if !ok {
					return connect.NewError(connect.CodeNotFound, "no such service here; List names them")
				}
				return stream.Send(&healthv1.HealthCheckResponse{Status: status})
			},
		},
		connect.Method{
			Spec: spec("List", connect.StreamTypeUnary),
			Handler: func(_ context.Context, _ connect.Spec, stream connect.ServerStream) error {
				var request healthv1.HealthListRequest
				if err := stream.Receive(&request); err != nil {
					return err
				}
				statuses := make(map[string]*healthv1.HealthCheckResponse, len(checks)+1)
				for _, name := range append(slices.Collect(maps.Keys(checks)), "") {
					status, _ := checks.status(name)
					statuses[name] = &healthv1.HealthCheckResponse{Status: status}
				}
				return stream.Send(&healthv1.HealthListResponse{Statuses: statuses})
			},
		},
		connect.Method{
			Spec: spec("Watch", connect.StreamTypeServer),
			Handler: func(ctx context.Context, _ connect.Spec, stream connect.ServerStream) error {
				var request healthv1.HealthCheckRequest
				if err := stream.Receive(&request); err != nil {
					return err
				}
				return watchHealth(ctx, checks, request.GetService(), stream)
			},
		},
	)
}

// watchHealth sends the status now and whenever it differs. As the health protocol
// wants it, an unknown service is a status here, not an error.
func watchHealth(ctx context.Context, checks Checks, service string, stream connect.ServerStream) error {
	ticker := time.NewTicker(healthPoll)
	defer ticker.Stop()
	last := healthv1.HealthCheckResponse_UNKNOWN
	for {
		if status, _ := checks.status(service); status != last {
			if err := stream.Send(&healthv1.HealthCheckResponse{Status: status}); err != nil {
				return err
			}
			last = status
		}
		select {
		case <-ticker.C:
		case <-stopping(ctx):
			return connect.NewError(connect.CodeUnavailable, "the server is stopping")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// MountHealth serves GET /health/live (200 while the process runs, whatever is
// downstream) and GET /health/ready (200 or 503, and JSON {ready, reasons}).
func MountHealth(mux *http.ServeMux, checks Checks) {
	mux.HandleFunc("GET /health/live", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /health/ready", func(w http.ResponseWriter, _ *http.Request) {
		reasons := checks.reasons()
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		if len(reasons) > 0 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		// An error means that the prober hung up.
		_ = json.NewEncoder(w).Encode(struct {
			Ready   bool     `json:"ready"`
			Reasons []string `json:"reasons"`
		}{len(reasons) == 0, reasons})
	})
}

// MountOperator serves what only operators may see: health, metrics on /metrics and
// profiles on /debug/pprof/. Mount it on a port that clients cannot reach.
func MountOperator(mux *http.ServeMux, checks Checks, metrics http.Handler) {
	MountHealth(mux, checks)
	mux.Handle("GET /metrics", metrics)
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
}
