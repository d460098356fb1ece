{{/*
Deployment of a service. Takes
  root       the chart's context
  ports      {name, containerPort}; the operator port is the last one
  given      flags that the chart decides: they replace those of .Values.flags
  env        environment, for secrets
  secret     {name, key}: mounted as /run/secrets/topgun/<key>; may be left out
  single     whether there is never more than one pod
*/}}
{{- define "topgun.deployment" -}}
{{- $_ := merge . (dict "env" list "secret" dict "single" false) -}}
{{- $root := .root -}}
{{- $v := .root.Values -}}
{{- $operator := (last .ports).name -}}
{{- /* Where there is one pod, nobody else could serve meanwhile. */ -}}
{{- $wait := .single | ternary 0 (int (get $v "preStopSeconds")) -}}
apiVersion: apps/v1
kind: Deployment
metadata: {{- include "topgun.metadata" $root | nindent 2 }}
spec:
  {{- if or .single (not $v.autoscaling.enabled) }}
  replicas: {{ $v.replicas }}
  {{- end }}
  selector:
    matchLabels: {{- include "topgun.selector" $root | nindent 6 }}
  strategy:
    {{- if .single }}
    # Never two at a time; replicas in values.yaml says why.
    type: Recreate
    {{- else }}
    type: RollingUpdate
    rollingUpdate: {maxSurge: 1, maxUnavailable: 0}
    {{- end }}
  template:
    metadata:
      labels: {{- include "topgun.labels" $root | nindent 8 }}
      {{- with $v.podAnnotations }}
      annotations: {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      serviceAccountName: {{ include "topgun.name" $root }}
      # No service speaks with the API server, nor reads its addresses from variables.
      automountServiceAccountToken: false
      enableServiceLinks: false
      # A service stops within 30 s of SIGTERM; what preStop waits comes before.
      terminationGracePeriodSeconds: {{ add 30 $wait }}
      securityContext:
        runAsNonRoot: true
        runAsUser: 65532
        runAsGroup: 65532
        fsGroup: 65532
        seccompProfile: {type: RuntimeDefault}
      {{- with $v.global.imagePullSecrets }}
      imagePullSecrets: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $v.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
      {{- with $v.nodeSelector }}
      nodeSelector: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $v.tolerations }}
      tolerations: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $v.affinity }}
      affinity: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- if not .single }}
      topologySpreadConstraints:
        {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
        - topologyKey: {{ . }}
          maxSkew: 1
          whenUnsatisfiable: ScheduleAnyway
          # Only the pods of one version are spread: during a roll the old ones go.
          matchLabelKeys: [pod-template-hash]
          labelSelector:
            matchLabels: {{- include "topgun.selector" $root | nindent 14 }}
        {{- end }}
      {{- end }}
      containers:
        - name: {{ $root.Chart.Name }}
          image: {{ include "topgun.image" $root | quote }}
          imagePullPolicy: {{ $v.image.pullPolicy }}
          args:
            {{- range $arg := include "topgun.args" (merge .given $v.flags) | fromJsonArray }}
            - {{ $arg | quote }}
            {{- end }}
          {{- with .env }}
          env: {{- toYaml . | nindent 12 }}
          {{- end }}
          ports: {{- toYaml .ports | nindent 12 }}
          # The port opens once NATS (and Postgres) answered. From then on the process
          # lives, however long it takes until it is ready: recovery is never cut short.
          startupProbe:
            httpGet: {path: /health/live, port: {{ $operator }}}
            periodSeconds: 5
            timeoutSeconds: 3
            failureThreshold: {{ div (int $v.startupSeconds) 5 }}
          livenessProbe:
            httpGet: {path: /health/live, port: {{ $operator }}}
            periodSeconds: 10
            timeoutSeconds: 3
            failureThreshold: 3
          readinessProbe:
            httpGet: {path: /health/ready, port: {{ $operator }}}
            periodSeconds: 5
            timeoutSeconds: 3
            failureThreshold: 2
          {{- if $wait }}
          # Until it is over the pod goes on serving, while everybody learns that it
          # is no longer an endpoint. The image has no shell: the kubelet sleeps.
          lifecycle:
            preStop:
              sleep: {seconds: {{ $wait }}}
          {{- end }}
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities: {drop: [ALL]}
          resources: {{- toYaml $v.resources | nindent 12 }}
          {{- with .secret }}
          volumeMounts:
            - {name: secret, mountPath: /run/secrets/topgun, readOnly: true}
          {{- end }}
      {{- with .secret }}
      volumes:
        - name: secret
          secret:
            secretName: {{ .name }}
            defaultMode: 0440
            items: [{key: {{ .key | quote }}, path: {{ .key | quote }}}]
      {{- end }}
{{- end }}

{{- define "topgun.image" -}}
{{- with .Values.global.imageRegistry }}{{ trimSuffix "/" . }}/{{ end -}}
{{ .Values.image.repository }}
{{- if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}

{{/*
The arguments for a map of flags, as a JSON array. Empty is the program's default,
true is the flag alone, a list is joined by commas.
*/}}
{{- define "topgun.args" -}}
{{- $args := list -}}
{{- range $name, $value := . -}}
  {{- if kindIs "slice" $value -}}{{- $value = join "," $value -}}{{- end -}}
  {{- if eq $name "shards" "log-max-bytes" "log-replicas" "journal-bytes" -}}
    {{- /* YAML's numbers arrive as floats, which print as 8.589934592e+09. */ -}}
    {{- $args = append $args (printf "--%s=%d" $name (int64 $value)) -}}
  {{- else if kindIs "bool" $value -}}
    {{- if $value -}}{{- $args = append $args (printf "--%s" $name) -}}{{- end -}}
  {{- else if $value -}}
    {{- $args = append $args (printf "--%s=%s" $name $value) -}}
  {{- end -}}
{{- end -}}
{{- toJson $args -}}
{{- end }}

{{/* A variable from a key of an existing Secret. Takes variable, secret, key. */}}
{{- define "topgun.secretEnv" -}}
- name: {{ .variable }}
  valueFrom:
    secretKeyRef: {name: {{ .secret }}, key: {{ .key | quote }}}
{{- end }}

{{/* Where NATS is: a flag, or a variable when the URL holds a password. */}}
{{- define "topgun.natsFlag" -}}
{{- if not .Values.global.nats.existingSecret }}{{ .Values.global.nats.url }}{{ end -}}
{{- end }}

{{- define "topgun.natsEnv" -}}
{{- with .Values.global.nats }}
{{- if .existingSecret }}
{{- include "topgun.secretEnv" (dict "variable" "TOPGUN_NATS" "secret" .existingSecret "key" .key) }}
{{- end }}
{{- end }}
{{- end }}
