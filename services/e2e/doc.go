// Package e2e holds the user stories of TopGun: what somebody who runs the server
// and somebody who uses a client can rely on, tried against real processes.
//
// Every story is written once against the Cluster interface and runs in two
// topologies: the one binary, and the four services as processes of their own with
// a NATS server and a Postgres beside them. The package owns the harness that
// starts, kills and restarts these processes; it never reaches into a service. What
// it believes comes from outside: from frames on a socket, from clients, and from
// the rows of the database.
//
// A test that fails shows the output of all processes. With TOPGUN_TEST_LONG set the crash
// story kills four times as often, as it should before a release. The seed that it
// prints decides what is killed; when an ack arrives is up to the machine, so a
// seed narrows a failure down and does not replay it exactly.
//
// The stories do not measure speed and do not replace the tests of a room.
package e2e
