// Package charts holds the tests of the Helm charts in deploy/helm. It has no other
// code. It renders the charts as Helm does, without a cluster, and holds them against
// the programs, the architecture and the schema of Kubernetes; that a cluster runs
// them is not tested.
package charts
