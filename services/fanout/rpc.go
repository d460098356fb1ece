package fanout

import (
	"context"
	"errors"

	"connectrpc.com/connect/v2"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1/fanoutv1connect"
)

// maxNameBytes bounds a map's name (RELIABILITY 3) and a gateway's.
const maxNameBytes = 128

// rpcHandler is the service as its callers see it.
type rpcHandler struct{ service *Service }

var _ fanoutv1connect.FanoutServiceHandler = rpcHandler{}

// Subscribe serves a stream: this goroutine sends what the bus queues.
func (h rpcHandler) Subscribe(ctx context.Context, req *fanoutv1.SubscribeRequest, out fanoutv1connect.FanoutServiceSubscribeServerStream) error {
	if n := len(req.GetGatewayId()); n < 1 || n > maxNameBytes {
		return connect.NewError(connect.CodeInvalidArgument, "gateway_id must have 1 to 128 bytes")
	}
	st, err := h.service.open(req.GetGatewayId())
	if err != nil {
		return rpcError(err)
	}
	defer h.service.closeStream(st)
	ready := &fanoutv1.SubscribeResponse{Message: &fanoutv1.SubscribeResponse_Ready{Ready: &fanoutv1.Ready{StreamId: st.id}}}
	if err := out.Send(ready); err != nil {
		return err
	}
	for {
		message, err := st.next(ctx)
		if err != nil {
			return rpcError(err)
		}
		if err := out.Send(message); err != nil {
			return err
		}
		h.service.meters.eventsOut.Add(ctx, 1)
	}
}

// Watch changes the maps of a stream.
func (h rpcHandler) Watch(ctx context.Context, req *fanoutv1.WatchRequest) (*fanoutv1.WatchResponse, error) {
	for _, names := range [][]string{req.GetAdd(), req.GetRemove()} {
		for _, name := range names {
			if len(name) < 1 || len(name) > maxNameBytes {
				return nil, connect.NewError(connect.CodeInvalidArgument, "names of maps must have 1 to 128 bytes")
			}
		}
	}
	if err := h.service.watch(ctx, req.GetStreamId(), req.GetAdd(), req.GetRemove()); err != nil {
		return nil, rpcError(err)
	}
	return &fanoutv1.WatchResponse{}, nil
}

// Describe counts streams and maps.
func (h rpcHandler) Describe(context.Context, *fanoutv1.DescribeRequest) (*fanoutv1.DescribeResponse, error) {
	streams, maps := h.service.describe()
	return &fanoutv1.DescribeResponse{Streams: uint32(streams), Maps: uint32(maps)}, nil
}

// rpcError translates the room's errors, once. The texts of ours are written for
// callers; a cause stays here.
func rpcError(err error) error {
	for _, known := range []struct {
		is   error
		code connect.Code
	}{
		{errNotRunning, connect.CodeUnavailable},
		{errBus, connect.CodeUnavailable},
		{errTooManyStreams, connect.CodeResourceExhausted},
		{errTooManyMaps, connect.CodeResourceExhausted},
		{errSlow, connect.CodeResourceExhausted},
		{errNoStream, connect.CodeNotFound},
	} {
		if errors.Is(err, known.is) {
			return connect.NewError(known.code, known.is.Error()).WithCause(err)
		}
	}
	return err
}
