package fanout

import (
	"context"
	"errors"
	"strings"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/msgval"
	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1/fanoutv1connect"
)

// maxNameBytes bounds a map's name (RELIABILITY 3) and a gateway's.
const maxNameBytes = 128

// Limits of a topic message, which the proto gives, and of who published it.
const (
	maxTopicBytes     = 256
	maxTopicDataBytes = 256 << 10
	maxPublisherBytes = 4096
	maxOriginBytes    = 128
)

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
		message, due, err := st.next(ctx)
		if err != nil {
			return rpcError(err)
		}
		if due != nil {
			if message = h.service.result(due); message == nil {
				continue
			}
		}
		if err := out.Send(message); err != nil {
			return err
		}
		h.service.meters.eventsOut.Add(ctx, 1)
	}
}

// Watch changes what a stream brings. The maps and topics come first, all or nothing
// of them; queries have no effect where those fail.
func (h rpcHandler) Watch(ctx context.Context, req *fanoutv1.WatchRequest) (*fanoutv1.WatchResponse, error) {
	for _, names := range [][]string{req.GetAdd(), req.GetRemove()} {
		for _, name := range names {
			if len(name) < 1 || len(name) > maxNameBytes {
				return nil, connect.NewError(connect.CodeInvalidArgument, "names of maps must have 1 to 128 bytes")
			}
		}
	}
	for _, q := range req.GetAddQueries() {
		if n := len(q.GetMap()); n < 1 || n > maxNameBytes {
			return nil, connect.NewError(connect.CodeInvalidArgument, "names of maps must have 1 to 128 bytes")
		}
	}
	for _, topics := range [][]string{req.GetAddTopics(), req.GetRemoveTopics()} {
		for _, topic := range topics {
			if !isTopic(topic) {
				return nil, errTopicName
			}
		}
	}
	add := interest{req.GetAdd(), req.GetAddTopics()}
	remove := interest{req.GetRemove(), req.GetRemoveTopics()}
	if err := h.service.watch(ctx, req.GetStreamId(), add, remove); err != nil {
		return nil, rpcError(err)
	}
	if err := h.service.watchQueries(req); err != nil {
		return nil, rpcError(err)
	}
	return &fanoutv1.WatchResponse{}, nil
}

var errTopicName = connect.NewError(connect.CodeInvalidArgument, "names of topics must have 1 to 256 characters of A to Z, a to z, 0 to 9, '_', '-', '.', '/' and ':', without two dots in a row")

// isTopic checks a topic's name (PROTOCOL 14.1).
func isTopic(name string) bool {
	if len(name) < 1 || len(name) > maxTopicBytes || strings.Contains(name, "..") {
		return false
	}
	for _, c := range []byte(name) {
		switch {
		case 'A' <= c && c <= 'Z', 'a' <= c && c <= 'z', '0' <= c && c <= '9':
		case c == '_', c == '-', c == '.', c == '/', c == ':':
		default:
			return false
		}
	}
	return true
}

// Publish sends a message to the subscribers of a topic.
func (h rpcHandler) Publish(ctx context.Context, req *fanoutv1.PublishRequest) (*fanoutv1.PublishResponse, error) {
	message := req.GetMessage()
	if !isTopic(message.GetTopic()) {
		return nil, errTopicName
	}
	if len(message.GetData()) > maxTopicDataBytes {
		return nil, connect.NewError(connect.CodeInvalidArgument, "data must have at most 256 KiB")
	}
	if rest, err := msgval.Check(message.GetData()); err != nil || len(rest) > 0 {
		return nil, connect.NewError(connect.CodeInvalidArgument, "data must be one msgpack value").WithCause(err)
	}
	if len(message.GetPublisherId()) > maxPublisherBytes || len(message.GetOrigin()) > maxOriginBytes {
		return nil, connect.NewError(connect.CodeInvalidArgument, "publisher_id must have at most 4096 bytes, and origin at most 128")
	}
	if err := h.service.publish(ctx, message); err != nil {
		return nil, rpcError(err)
	}
	return &fanoutv1.PublishResponse{}, nil
}

// Describe counts streams and what they watch.
func (h rpcHandler) Describe(context.Context, *fanoutv1.DescribeRequest) (*fanoutv1.DescribeResponse, error) {
	streams, maps, queries, topics := h.service.describe()
	return &fanoutv1.DescribeResponse{Streams: uint32(streams), Maps: uint32(maps), Queries: uint32(queries), Topics: uint32(topics)}, nil
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
		{errTooManyTopics, connect.CodeResourceExhausted},
		{errTooManyQueries, connect.CodeResourceExhausted},
		{errBigMessage, connect.CodeInvalidArgument},
		{errSlow, connect.CodeResourceExhausted},
		{errNoStream, connect.CodeNotFound},
	} {
		if errors.Is(err, known.is) {
			return connect.NewError(known.code, known.is.Error()).WithCause(err)
		}
	}
	return err
}
