package gateway

import (
	"context"
	"errors"
	"fmt"

	"github.com/topgun-sync/topgun/core/query"
	"github.com/topgun-sync/topgun/core/wire"
)

// queryPage and queryPageBytes bound one read of a query from each owner.
const (
	queryPage      = 1000
	queryPageBytes = 4 << 20
)

// queries answers one-shot queries.
func (a *syncAnswer) queries(ctx context.Context, queries []wire.HTTPQuery) {
	for _, q := range queries {
		result, err := a.query(ctx, q)
		var refused *wire.Error
		switch {
		case err == nil:
			a.response.QueryResults = append(a.response.QueryResults, *result)
		case errors.As(err, &refused):
			a.fail(refused.Code, refused.Error(), q.QueryID)
		case errors.Is(err, errUnavailable):
			a.fail(503, "UNAVAILABLE: the map cannot be read now; ask again", q.QueryID)
		default:
			a.s.log.Error("a query was not answered", "error", err)
			a.fail(500, "INTERNAL: the query was not answered", q.QueryID)
		}
	}
}

// query answers one query: rows, or groups (PROTOCOL 12.4), from its cursor or offset on.
func (a *syncAnswer) query(ctx context.Context, q wire.HTTPQuery) (*wire.HTTPQueryResult, error) {
	if q.Err != nil {
		return nil, q.Err
	}
	if q.Offset > maxQueryOffset {
		return nil, &wire.Error{Name: "BAD_QUERY", Code: 400, Text: fmt.Sprintf("offset is at most %d; go on with cursor", maxQueryOffset)}
	}
	parsed, refused := parseQuery(q.MapName, q.Query, nil)
	if refused != nil {
		return nil, refused
	}
	after, status := parsed.ResolveCursor(q.MapName)
	if status == query.CursorInvalid {
		return nil, &wire.Error{Name: "BAD_CURSOR", Code: 400, Text: "the cursor is not one of this query's; begin without"}
	}
	limit := defaultQueryLimit
	if n := parsed.Limit(); n > 0 {
		limit = min(n, maxQueryLimit)
	}
	var rows []query.Row
	var more bool
	var err error
	if parsed.Grouped() {
		rows, more, err = a.groups(ctx, q.MapName, parsed, after, limit)
	} else {
		rows, more, err = a.rows(ctx, q.MapName, parsed, after, limit)
	}
	if err != nil {
		return nil, err
	}
	result := &wire.HTTPQueryResult{QueryID: q.QueryID, Results: make([]wire.KeyValue, len(rows)), HasMore: more}
	for i, row := range rows {
		value := row.Value
		if !parsed.Grouped() {
			value = parsed.Project(nil, value)
		}
		result.Results[i] = wire.KeyValue{Key: row.Key, Value: value}
	}
	switch {
	case !more:
	case len(rows) > 0:
		result.NextCursor = parsed.CursorAt(q.MapName, rows[len(rows)-1])
	default: // nothing fitted
		result.NextCursor = q.Cursor
	}
	return result, nil
}

// groups reads the groups of a query. They are few, and read as a whole.
func (a *syncAnswer) groups(ctx context.Context, mapName string, q *query.Query, after []byte, limit int) ([]query.Row, bool, error) {
	all, err := a.s.router.Groups(ctx, mapName, q)
	if err != nil {
		return nil, false, err
	}
	rows, more := all.Rows(after)
	if len(rows) > limit {
		rows, more = rows[:limit], true
	}
	kept := a.fit(rows)
	return rows[:kept], more || kept < len(rows), nil
}

// rows reads rows page by page, until the limit or as many as fit in the response. The
// rows that the offset leaves out are read too, and dropped.
func (a *syncAnswer) rows(ctx context.Context, mapName string, q *query.Query, after []byte, limit int) (rows []query.Row, more bool, err error) {
	skip := q.Offset()
	for {
		var page []query.Row
		page, more, err = a.s.router.Query(ctx, mapName, q, after, min(limit-len(rows)+skip, queryPage), queryPageBytes)
		if err != nil {
			return nil, false, err
		}
		if len(page) == 0 {
			return rows, more, nil
		}
		after = q.Position(page[len(page)-1])
		dropped := min(skip, len(page))
		skip -= dropped
		page = page[dropped:]
		kept := a.fit(page)
		rows = append(rows, page[:kept]...)
		switch {
		case kept < len(page):
			return rows, true, nil
		case len(rows) == limit || !more:
			return rows, more, nil
		}
	}
}

// fit counts the rows that still fit in the response: none once it is full, and one
// however large it is.
func (a *syncAnswer) fit(rows []query.Row) (n int) {
	for ; n < len(rows) && a.left > 0; n++ {
		size := len(rows[n].Key) + len(rows[n].Value)
		if size > a.left && n > 0 {
			break
		}
		a.left -= size
	}
	return n
}
