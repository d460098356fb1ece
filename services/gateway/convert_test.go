package gateway

import (
	"reflect"
	"testing"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/wire"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
)

func TestConvertRoundTrip(t *testing.T) {
	ops := []wire.Op{
		{MapName: "m", Key: "k", Record: lwwmap.Record{Value: text("v"), Timestamp: hlc.Timestamp{Millis: 1 << 53, Counter: 7, NodeID: "n"}, TTLMillis: 9}},
		{MapName: "m2", Key: "\xff", Record: lwwmap.Record{Timestamp: hlc.Timestamp{Millis: 1, NodeID: "n"}}},
	}
	for i, proto := range opsToProto(ops) {
		if got := recordFromProto(proto.Record); !reflect.DeepEqual(got, ops[i].Record) || proto.Map != ops[i].MapName || string(proto.Key) != ops[i].Key {
			t.Errorf("op %d came back as %+v", i, got)
		}
	}
	at := hlc.Timestamp{Millis: 5, Counter: 6}
	if got := arrivalFromProto(arrivalToProto(at)); got != at {
		t.Errorf("arrival %v", got)
	}
	if combineToProto(merkle.Plain) != partitionv1.Combine_COMBINE_PLAIN || combineToProto(merkle.Mixed) != partitionv1.Combine_COMBINE_MIXED {
		t.Error("combine")
	}
}

// TestLevelNameClaimsNothing: ACK-03, also for levels that a newer owner may have.
func TestLevelNameClaimsNothing(t *testing.T) {
	for level, want := range map[partitionv1.Level]string{
		-1: "FIRE_AND_FORGET", 0: "FIRE_AND_FORGET", 1: "MEMORY", 2: "APPLIED", 3: "REPLICATED", 4: "PERSISTED", 5: "FIRE_AND_FORGET",
	} {
		if got := levelName(level); got != want {
			t.Errorf("level %d is %s, want %s", level, got, want)
		}
	}
}
