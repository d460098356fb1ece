package client_test

import (
	"context"
	"fmt"
	"time"

	"github.com/topgun-sync/topgun/client"
)

// A map that works at once and syncs when there is a server.
func Example() {
	ctx := context.Background()
	c, err := client.Open(ctx, client.Config{URL: "ws://127.0.0.1:8080/ws"})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()

	todos := c.Map("todos")
	if err := todos.Set("1", map[string]any{"title": "milk"}); err != nil {
		fmt.Println(err)
		return
	}
	if err := todos.SetTTL("2", "gone in an hour", time.Hour); err != nil {
		fmt.Println(err)
		return
	}
	for key := range todos.All() {
		fmt.Println(key)
	}

	// Only who needs to know that the server has it waits for it.
	wait, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	if err := c.Flush(wait); err != nil {
		fmt.Println("not acknowledged yet:", c.Pending())
	}
	// Output:
	// 1
	// 2
	// not acknowledged yet: 2
}

// Following what happens to a map, here and elsewhere.
func ExampleMap_Watch() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	c, err := client.Open(ctx, client.Config{URL: "https://127.0.0.1:1", Token: client.StaticToken("…")})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()

	todos := c.Map("todos")
	changes := todos.Watch(ctx)
	_ = todos.Set("1", "milk")
	_ = todos.Delete("1")
	for ch := range changes {
		fmt.Println(ch.Key, "deleted:", ch.Record.Deleted(), "by us:", ch.Local)
		break
	}
	// Output:
	// 1 deleted: true by us: true
}
