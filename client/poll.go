package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/topgun-sync/topgun/core/wire"
)

// maxQueries bounds the one-shot queries of one request; others wait for the next.
const maxQueries = 16

// Query asks the server once for the records of a map.
type Query struct {
	// Map is the name of the map. It need not be open.
	Map string
	// Where lists fields and the values they must have; empty matches all.
	Where map[string]any
	// Limit is the most rows wanted; 0 leaves it to the server.
	Limit uint64
	// Cursor continues after an earlier answer; empty begins.
	Cursor string
}

// QueryResult is the answer to a Query.
type QueryResult struct {
	Rows []Row
	// HasMore says that Cursor continues after Rows.
	HasMore bool
	Cursor  string
}

// Row is one record of a QueryResult.
type Row struct {
	Key   string
	Value any
}

// pendingQuery is a query that waits for a response. The client's lock guards it
// until it is done.
type pendingQuery struct {
	query  wire.HTTPQuery
	result QueryResult
	err    error
	done   bool
}

// Query sends the query with the next request, which goes out at once, and waits
// for the answer. It is kept while the server cannot be reached, until ctx ends.
// It is for http:// and https:// URLs only.
func (c *Client) Query(ctx context.Context, q Query) (QueryResult, error) {
	if !strings.HasPrefix(c.cfg.URL, "http") {
		return QueryResult{}, ErrTransport
	}
	p := &pendingQuery{query: wire.HTTPQuery{MapName: q.Map, Limit: q.Limit, Cursor: q.Cursor}}
	if len(q.Where) > 0 {
		where, err := EncodeValue(q.Where)
		if err != nil {
			return QueryResult{}, err
		}
		p.query.Where = where
	}
	c.mu.Lock()
	c.lastQuery++
	p.query.QueryID = "q" + strconv.FormatUint(c.lastQuery, 10)
	c.queries = append(c.queries, p)
	c.wakeUp()
	c.mu.Unlock()
	err := c.await(ctx, func() bool { return p.done })
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queries = slices.DeleteFunc(c.queries, func(o *pendingQuery) bool { return o == p })
	if err != nil && !p.done {
		return QueryResult{}, fmt.Errorf("query: %w", err)
	}
	return p.result, p.err
}

// servePolling polls until a request fails, and returns why. A failed request is
// simply built again from what is still pending: operations and cursors change
// only with an answer.
func (c *Client) servePolling(ctx context.Context) error {
	for {
		answered, more, err := c.poll(ctx)
		if err != nil {
			return err
		}
		c.mu.Lock()
		if c.state != Ready {
			c.setState(Ready, nil)
		}
		c.mu.Unlock()
		if more {
			continue
		}
		pause := time.NewTimer(c.cfg.PollInterval)
		wake := c.wake
		if !answered {
			wake = nil // the server cannot take operations at the moment; do not press
		}
		select {
		case <-ctx.Done():
			pause.Stop()
			return ctx.Err()
		case <-wake:
		case <-pause.C:
		}
		pause.Stop()
	}
}

// poll makes one request. answered is false if operations were sent and not
// acknowledged; more is true if there is reason to poll again at once.
func (c *Client) poll(ctx context.Context) (answered, more bool, err error) {
	req, sent := c.syncRequest()
	resp, err := c.post(ctx, req)
	if err != nil {
		return false, false, err
	}
	if resp.Ack != nil {
		c.acknowledge(resp.Ack.LastID, resp.Ack.Results, sent)
	}
	for _, e := range resp.Errors {
		c.log.Warn("error from the server", "code", e.Code, "message", e.Message, "context", e.Context)
		c.failQuery(e)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.observe(resp.ServerHLC)
	for _, d := range resp.Deltas {
		m := c.maps[d.MapName]
		if m == nil {
			continue
		}
		for _, r := range d.Records {
			m.event(r.Key, r.Record)
		}
		// A refusal in this answer, or a record that was adopted, has set the cursor
		// back; the position of this answer must not undo that.
		if !slices.ContainsFunc(req.SyncMaps, func(asked wire.SyncMap) bool {
			return asked.MapName == m.name && asked.LastSync == m.cursor
		}) {
			more = true
			continue
		}
		m.cursor = d.ServerSyncTimestamp
		if d.HasMore {
			more = true
			continue
		}
		m.syncedAt(resp.ServerHLC.Millis)
	}
	for _, r := range resp.QueryResults {
		c.settleQuery(r)
	}
	_, unsent := c.ops.batch(sent, 1, 0)
	answered = len(req.Operations) == 0 || resp.Ack != nil
	more = more || unsent > sent && answered || len(req.Queries) == maxQueries
	return answered, more, nil
}

// syncRequest builds a request from everything that is pending, and returns the id
// of the last operation in it.
func (c *Client) syncRequest() (req *wire.SyncRequest, sent uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	req = &wire.SyncRequest{ClientID: c.cfg.NodeID, ClientHLC: c.clock.Now()}
	req.Operations, sent = c.ops.batch(0, maxBatchOps, maxBatchBytes)
	for _, m := range c.maps {
		req.SyncMaps = append(req.SyncMaps, wire.SyncMap{MapName: m.name, LastSync: m.cursor})
	}
	for _, q := range c.queries {
		if !q.done && len(req.Queries) < maxQueries {
			req.Queries = append(req.Queries, q.query)
		}
	}
	return req, sent
}

// settleQuery gives a query its answer. The caller holds the lock.
func (c *Client) settleQuery(r wire.HTTPQueryResult) {
	for _, q := range c.queries {
		if q.query.QueryID != r.QueryID || q.done {
			continue
		}
		q.done = true
		q.result = QueryResult{HasMore: r.HasMore, Cursor: r.NextCursor}
		for _, row := range r.Results {
			v, err := DecodeValue(row.Value)
			if err != nil {
				q.err = err
				break
			}
			q.result.Rows = append(q.result.Rows, Row{Key: row.Key, Value: v})
		}
		c.notify()
	}
}

// failQuery ends the query that an error of the response is about, if any.
func (c *Client) failQuery(e wire.SyncError) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, q := range c.queries {
		if q.query.QueryID == e.Context && !q.done {
			q.done, q.err = true, fmt.Errorf("query: the server answered %d: %s", e.Code, e.Message)
			c.notify()
		}
	}
}

func (c *Client) post(ctx context.Context, req *wire.SyncRequest) (*wire.SyncResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.timing.request)
	defer cancel()
	body := req.AppendTo(nil)
	post, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(c.cfg.URL, "/")+"/sync", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	post.Header.Set("Content-Type", "application/x-msgpack")
	if c.cfg.Token != nil {
		token, err := c.cfg.Token(ctx)
		if err != nil {
			return nil, fmt.Errorf("get a token: %w", err)
		}
		post.Header.Set("Authorization", "Bearer "+token)
	}
	c.cfg.OnFrame(Frame{Sent: true, Data: body})
	resp, err := c.http.Do(post)
	if err != nil {
		return nil, fmt.Errorf("poll: %w", err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxFrame+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("poll: %w", err)
	case resp.StatusCode == http.StatusUnauthorized:
		return nil, ErrAuthFailed
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("poll: the server answered %d", resp.StatusCode)
	case len(data) > maxFrame:
		return nil, errors.New("poll: the answer is larger than 16 MiB")
	}
	c.cfg.OnFrame(Frame{Data: data})
	decoded, err := wire.DecodeSyncResponse(data)
	if err != nil {
		return nil, fmt.Errorf("poll: %w", err)
	}
	return decoded, nil
}
