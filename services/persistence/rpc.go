package persistence

import (
	"context"
	"errors"
	"fmt"

	connect "connectrpc.com/connect/v2"

	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1/persistencev1connect"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// chunkBytes bounds the records of one LoadResponse. A record above it travels
// alone; none is above 256 KiB and some.
const chunkBytes = 1 << 20

// defaultPage and maxPage are how many entries a page of the journal has.
const (
	defaultPage = 100
	maxPage     = 1000
)

// Register registers the service's handlers.
func (s *Service) Register(server *connect.Server) {
	persistencev1connect.RegisterPersistenceServiceHandler(server, handler{s})
}

// handler translates between the RPCs and the service.
type handler struct{ *Service }

func (h handler) Load(ctx context.Context, req *persistencev1.LoadRequest, stream persistencev1connect.PersistenceServiceLoadServerStream) error {
	partitions, err := partitionsOf(req.GetPartitions())
	if err != nil {
		return connect.NewError(connect.CodeInvalidArgument, err.Error())
	}
	// An error of the stream is the caller's end and goes back as it is; one of the
	// store is ours and is translated.
	var sendErr error
	var chunk []*typesv1.Change
	size := 0
	send := func(response *persistencev1.LoadResponse) error {
		sendErr = stream.Send(response)
		return sendErr
	}
	err = h.store.Load(ctx, partitions,
		func(marks []Watermark) error {
			return send(&persistencev1.LoadResponse{Watermarks: protoWatermarks(marks)})
		},
		func(record Record) error {
			if n := record.Size(); len(chunk) > 0 && size+n > chunkBytes {
				if err := send(&persistencev1.LoadResponse{Changes: chunk}); err != nil {
					return err
				}
				chunk, size = nil, 0
			}
			chunk = append(chunk, changeOf(record))
			size += record.Size()
			return nil
		})
	if err == nil && len(chunk) > 0 {
		err = send(&persistencev1.LoadResponse{Changes: chunk})
	}
	if sendErr != nil {
		return sendErr
	}
	return h.translate(ctx, "load", err)
}

func (h handler) Watermarks(ctx context.Context, _ *persistencev1.WatermarksRequest) (*persistencev1.WatermarksResponse, error) {
	marks, err := h.store.Watermarks(ctx)
	if err != nil {
		return nil, h.translate(ctx, "watermarks", err)
	}
	return &persistencev1.WatermarksResponse{Watermarks: protoWatermarks(marks)}, nil
}

func (h handler) Flush(ctx context.Context, _ *persistencev1.FlushRequest) (*persistencev1.FlushResponse, error) {
	sequence, err := h.flush(ctx)
	if err != nil {
		return nil, h.translate(ctx, "flush", err)
	}
	return &persistencev1.FlushResponse{Sequence: sequence}, nil
}

func (h handler) FollowWatermarks(ctx context.Context, _ *persistencev1.FollowWatermarksRequest, stream persistencev1connect.PersistenceServiceFollowWatermarksServerStream) error {
	var sendErr error
	err := h.followWatermarks(ctx, func(marks []Watermark) error {
		sendErr = stream.Send(&persistencev1.FollowWatermarksResponse{Watermarks: protoWatermarks(marks)})
		return sendErr
	})
	if sendErr != nil {
		return sendErr
	}
	return h.translate(ctx, "follow watermarks", err)
}

func (h handler) ReadJournal(ctx context.Context, req *persistencev1.ReadJournalRequest) (*persistencev1.ReadJournalResponse, error) {
	filter, err := journalFilterOf(req.GetFilter())
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err.Error())
	}
	limit := int(req.GetLimit())
	switch {
	case limit == 0:
		limit = defaultPage
	case limit > maxPage:
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Sprintf("limit must be 0 to %d", maxPage))
	}
	page, err := h.journal.read(ctx, req.GetFromSequence(), limit, filter)
	if err != nil {
		return nil, h.translate(ctx, "read the journal", err)
	}
	return &persistencev1.ReadJournalResponse{Entries: protoJournal(page.entries), More: page.more}, nil
}

func (h handler) FollowJournal(ctx context.Context, req *persistencev1.FollowJournalRequest, stream persistencev1connect.PersistenceServiceFollowJournalServerStream) error {
	filter, err := journalFilterOf(req.GetFilter())
	if err != nil {
		return connect.NewError(connect.CodeInvalidArgument, err.Error())
	}
	var sendErr error
	err = h.journal.follow(ctx, req.GetFromSequence(), filter, func(entries []journalEntry) error {
		for {
			n, size := 0, 0
			for n < len(entries) && (n == 0 || size+entries[n].size() <= chunkBytes) {
				size += entries[n].size()
				n++
			}
			sendErr = stream.Send(&persistencev1.FollowJournalResponse{Entries: protoJournal(entries[:n])})
			entries = entries[n:]
			if sendErr != nil || len(entries) == 0 {
				return sendErr
			}
		}
	})
	if sendErr != nil {
		return sendErr
	}
	return h.translate(ctx, "follow the journal", err)
}

func (h handler) Describe(ctx context.Context, _ *persistencev1.DescribeRequest) (*persistencev1.DescribeResponse, error) {
	description, err := h.describe(ctx)
	if err != nil {
		return nil, h.translate(ctx, "describe", err)
	}
	return &persistencev1.DescribeResponse{
		Store:      h.config.Store,
		Records:    description.Records,
		Tombstones: description.Tombstones,
		Sequence:   description.stored,
		Lag:        description.lag,
	}, nil
}

// translate turns an error of the room into one for callers, with a fixed text,
// and logs what is worth an operator's look.
func (h handler) translate(ctx context.Context, call string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled):
		return connect.NewError(connect.CodeCanceled, "the caller went away")
	case errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, "the deadline passed first")
	case errors.Is(err, errHalted):
		return connect.NewError(connect.CodeFailedPrecondition, "the drain has halted; the service's log says why")
	case errors.Is(err, errScanTime):
		return connect.NewError(connect.CodeDeadlineExceeded, "the journal was not searched to an answer in time; the same call goes on where this one ended")
	case errors.Is(err, errTooSlow):
		return connect.NewError(connect.CodeResourceExhausted, "entries were not taken fast enough; follow again from the last sequence received plus one")
	case errors.Is(err, errTooMany):
		return connect.NewError(connect.CodeResourceExhausted, fmt.Sprintf("the journal has its %d followers", maxFollowers))
	case errors.Is(err, errReplaced):
		return connect.NewError(connect.CodeOutOfRange, "the position is beyond the end of the log, which was replaced or has lost commits; read the journal anew from the beginning")
	case errors.Is(err, errStopping):
		return connect.NewError(connect.CodeUnavailable, "the service is stopping; follow again")
	}
	h.logger.WarnContext(ctx, "a call cannot be answered", "call", call, "error", err)
	switch {
	case errors.Is(err, errLog):
		return connect.NewError(connect.CodeUnavailable, "the log is unavailable")
	case errors.Is(err, ErrUnavailable):
		return connect.NewError(connect.CodeUnavailable, "the store is unavailable")
	case errors.Is(err, ErrRefused):
		// Unavailable all the same: nothing is wrong with the call, and it can be
		// repeated once an operator has helped.
		return connect.NewError(connect.CodeUnavailable, "the store refuses to answer")
	default:
		return connect.NewError(connect.CodeInternal, "internal error")
	}
}
