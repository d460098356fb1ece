package memstore_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/topgun-sync/topgun/services/persistence"
	"github.com/topgun-sync/topgun/services/persistence/memstore"
	"github.com/topgun-sync/topgun/services/persistence/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestStore(t *testing.T) {
	storetest.Run(t, func(*testing.T) storetest.Harness {
		store := memstore.New()
		return storetest.Harness{Open: func(*testing.T) persistence.Store { return store }}
	})
}
