package gateway

import (
	"context"
	"time"

	"connectrpc.com/connect/v2"

	gatewayv1 "github.com/topgun-sync/topgun/gen/go/topgun/gateway/v1"
)

const (
	defaultSessionPage = 100
	maxSessionPage     = 1000
	maxDrain           = 10 * time.Minute
)

// operator is GatewayService: it translates and checks, the hub does the work.
type operator struct{ s *Service }

func (o operator) Describe(context.Context, *gatewayv1.DescribeRequest) (*gatewayv1.DescribeResponse, error) {
	sessions, draining := o.s.sockets.count()
	return &gatewayv1.DescribeResponse{
		GatewayId: o.s.cfg.GatewayID,
		Sessions:  uint32(sessions),
		Maps:      uint32(o.s.sockets.hub.watchedMaps()),
		Draining:  draining || o.s.draining.Load(),
	}, nil
}

func (o operator) ListSessions(_ context.Context, request *gatewayv1.ListSessionsRequest) (*gatewayv1.ListSessionsResponse, error) {
	limit := request.Limit
	if limit > maxSessionPage {
		return nil, connect.NewError(connect.CodeInvalidArgument, "limit: at most 1000; 0 means 100")
	}
	if limit == 0 {
		limit = defaultSessionPage
	}
	response := &gatewayv1.ListSessionsResponse{}
	for _, session := range o.s.sockets.list(request.AfterId, int(limit)) {
		response.Sessions = append(response.Sessions, &gatewayv1.Session{
			Id:            session.id,
			UserId:        session.userID,
			RemoteAddress: session.remote,
			OpenedMillis:  session.openedMillis,
			Maps:          session.maps,
			QueuedBytes:   session.queuedBytes,
		})
	}
	return response, nil
}

func (o operator) CloseSession(_ context.Context, request *gatewayv1.CloseSessionRequest) (*gatewayv1.CloseSessionResponse, error) {
	if request.Id == 0 {
		return nil, connect.NewError(connect.CodeInvalidArgument, "id: required; ids begin at 1")
	}
	return &gatewayv1.CloseSessionResponse{Closed: o.s.sockets.closeSession(request.Id)}, nil
}

func (o operator) Drain(ctx context.Context, request *gatewayv1.DrainRequest) (*gatewayv1.DrainResponse, error) {
	over := time.Duration(request.OverMillis) * time.Millisecond
	if over > maxDrain {
		return nil, connect.NewError(connect.CodeInvalidArgument, "over_millis: at most 600000, ten minutes")
	}
	o.s.draining.Store(true)
	return &gatewayv1.DrainResponse{Closed: uint32(o.s.sockets.drain(ctx, over))}, nil
}
