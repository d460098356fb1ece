package membus_test

import (
	"context"
	"testing"

	"go.uber.org/goleak"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/services/internal/bus/bustest"
	"github.com/topgun-sync/topgun/services/internal/bus/membus"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConformance(t *testing.T) {
	bustest.Run(t, func(t *testing.T) bustest.Harness {
		b := membus.New()
		t.Cleanup(func() {
			if err := b.Close(); err != nil {
				t.Error(err)
			}
		})
		return bustest.Harness{
			Bus:       b,
			Reconnect: b.Lose,
			Overrun: func(mapName string) {
				for n := range uint64(10_000) {
					if err := b.PublishEvent(context.Background(), &fanoutv1.Event{Map: mapName, Sequence: n + 2}); err != nil {
						t.Error(err)
					}
				}
			},
		}
	})
}
